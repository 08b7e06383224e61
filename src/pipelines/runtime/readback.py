"""A step's report on its way to the host, while the device goes on."""

from __future__ import annotations

from typing import Any, Final

import numpy as np
import numpy.typing as npt
from max.driver import Buffer, Device, Usage
from max.dtype import DType

__all__ = ["Readback", "Reading"]

# One is read while the other is written by the step that follows.
_BUFFERS: Final = 2


class Reading:
    """One report, int64 `[B, 2 + P]`: accepted drafts, next token and P proposals of each row.

    Args:
        report: where it is or will be, on the host.
        written: tells when; None: it is there as soon as it can be read.
    """

    def __init__(self, report: Buffer, written: Any = None) -> None:
        self._report = report
        self._written = written

    def wait(self) -> npt.NDArray[np.int64]:
        """The report; waits for the step that writes it, and for none after it."""
        if self._written is not None:
            self._written.synchronize()
        return np.array(self._report.to_numpy())


class Readback:
    """Copies reports to pinned memory of the host, which is kept for the next ones.

    Args:
        device: where the graph runs.
    """

    def __init__(self, device: Device) -> None:
        self._device = device
        self._pinned = [self._memory(1) for _ in range(_BUFFERS)]
        self._taken = 0

    def start(self, report: Buffer) -> Reading:
        """Enqueues the copy of a report behind the step that makes it.

        Args:
            report: int64 `[B, 2 + P]` on the device.

        Returns:
            To be waited for before the next but one is started.
        """
        self._taken = (self._taken + 1) % _BUFFERS
        size = report.shape[0] * report.shape[1]
        if size > self._pinned[self._taken].shape[0]:
            self._pinned[self._taken] = self._memory(size)
        staged = self._pinned[self._taken][:size].view(DType.int64, report.shape)
        staged.inplace_copy_from(report)
        return Reading(staged, self._device.default_queue.record_event())

    def _memory(self, size: int) -> Buffer:
        usage = Usage.STAGING | Usage.UNTRACKED
        return Buffer(DType.int64, (size,), device=self._device, usage=usage)
