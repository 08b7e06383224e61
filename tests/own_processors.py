"""Each of several test workers keeps to its part of the processors: imported before MAX is.

Threads of two workers that share processors wait for each other. MAX counts the processors that it
may use when it is imported. A compile, too, pays for its timers.
"""

from __future__ import annotations

import os

from unispec.waiting import wait_asleep

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


COUNT = _take_own()
"""Processors of this worker."""

wait_asleep()
