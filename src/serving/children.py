"""What the processes that a server starts do of themselves: they end with it."""

from __future__ import annotations

import ctypes
import logging
import os
import signal
import sys
from collections.abc import Callable
from typing import Any, Final

__all__ = ["MetricsCommit", "end_with_parent"]

_SET_DEATH_SIGNAL: Final = 1
"""`PR_SET_PDEATHSIG` of prctl(2)."""


def end_with_parent(parent: int) -> None:
    """Ends this process when the one that started it ends, however that is; on Linux.

    Args:
        parent: the id of that process, which may have ended already.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_SET_DEATH_SIGNAL, signal.SIGKILL, 0, 0, 0)
        if os.getppid() != parent:
            os._exit(1)


class MetricsCommit:
    """What the process of MAX's metrics does with each measurement, and, before any, of itself."""

    def __call__(self, measurement: Any) -> None:
        """Counts it."""
        measurement.commit()

    def __reduce__(self) -> tuple[Callable[[int], MetricsCommit], tuple[int]]:
        return _arrive, (os.getpid(),)


def _arrive(parent: int) -> MetricsCommit:
    """Called where a `MetricsCommit` is unpickled: in the process that is to use it."""
    end_with_parent(parent)
    # It announces its port as a warning.
    logging.getLogger("max.serve").setLevel(logging.ERROR)
    return MetricsCommit()
