"""The timers of a command's process.

After the first execution a thread of max 26.7 wakes up about 5,000 times a second. Where all
processors compute, each time interrupts a thread for which the others then wait. If timers may be
late it sleeps longer, and steps on a CPU become faster; on GPUs this was not measured.
"""

from __future__ import annotations

import ctypes
import sys
from typing import Final

__all__ = ["let_timers_be_late"]

_SET_TIMER_SLACK: Final = 29
"""`PR_SET_TIMERSLACK` of prctl(2)."""
_NANOSECONDS: Final = 20_000_000


def let_timers_be_late() -> None:
    """Lets timers of this thread be late by up to 20 ms; call it before MAX is imported.

    Threads and processes that this one starts later inherit it. Does nothing but on Linux.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_SET_TIMER_SLACK, _NANOSECONDS, 0, 0, 0)
