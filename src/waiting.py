"""How threads of a command's process wait for work on a CPU: they sleep.

By itself max 26.7 keeps a thread for each processor busy while it waits, between two kernels and
between two steps, and what a step does in Python, or another process, waits for these threads.
After the first execution one more of its threads wakes up about 5,000 times a second, and each time
interrupts one that computes. On GPUs none of this was measured.
"""

from __future__ import annotations

import ctypes
import logging
import os
import sys
from typing import Final

__all__ = ["wait_asleep"]

_LOGGER: Final = logging.getLogger(__name__)

_SET_TIMER_SLACK: Final = 29
"""`PR_SET_TIMERSLACK` of prctl(2)."""
_NANOSECONDS: Final = 20_000_000
_BUSY_WAIT: Final = ("MODULAR_THREAD_BUSY_WAIT_US", "MODULAR_RUNTIME_THREAD_BUSY_WAIT_TIME_US")
"""What MAX's driver reads, and its sessions; a process in which they differ is ended by MAX."""


def wait_asleep() -> None:
    """Lets MAX's threads sleep while they wait, and timers be late by up to 20 ms.

    Call it before MAX is imported: later it changes the timers alone, of threads that start from
    then on, and logs a warning. Processes that this one starts inherit both. A time of busy waiting
    that is in the environment already is kept, the driver's where there are two. Timers change on
    Linux only.
    """
    given = [os.environ[name] for name in _BUSY_WAIT if name in os.environ]
    wanted = dict.fromkeys(_BUSY_WAIT, given[0] if given else "0")
    if "max._core" not in sys.modules:
        os.environ.update(wanted)
    elif not wanted.items() <= os.environ.items():
        _LOGGER.warning(
            "MAX is imported already, so its threads stay busy while they wait: call this before"
        )
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_SET_TIMER_SLACK, _NANOSECONDS, 0, 0, 0)
