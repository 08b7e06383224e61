"""Each of several test workers keeps to its part of the processors: imported before MAX is.

Threads of two workers that share processors wait for each other, and MAX's wait by spinning. It
counts the processors that it may use when it is imported. After the first execution a thread of
MAX 26.7 also wakes up 5,000 times a second, which a compile pays for: docs/performance.md.
"""

from __future__ import annotations

import ctypes
import os
import sys

__all__ = ["COUNT"]


def _take_own() -> int:
    workers = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
    if not hasattr(os, "sched_setaffinity"):
        return max(1, (os.cpu_count() or 1) // workers)
    usable = sorted(os.sched_getaffinity(0))
    if workers > 1:
        number = int(os.environ["PYTEST_XDIST_WORKER"].removeprefix("gw"))
        os.sched_setaffinity(0, usable[number % len(usable) :: workers])
    return len(os.sched_getaffinity(0))


def _wake_up_less_often() -> None:
    """Lets this process's timers be late by up to 20 ms; threads and processes inherit it."""
    if sys.platform == "linux":
        set_timer_slack, nanoseconds = 29, 20_000_000  # see prctl(2)
        ctypes.CDLL(None).prctl(set_timer_slack, nanoseconds, 0, 0, 0)


COUNT = _take_own()
"""Processors of this worker."""

_wake_up_less_often()
