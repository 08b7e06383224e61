"""Persistent host-to-device buffers of the sampling parameters."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

import numpy as np
import numpy.typing as npt
from max.driver import Buffer, Device, batch_inplace_copy
from max.dtype import DType

from .inputs import BITMASK, PER_ROW, SAMPLING_PARAMETERS, RowSampling

__all__ = ["SamplingBuffers"]

_SCALARS: Final = {
    name: parameter.of_batch
    for name, parameter in SAMPLING_PARAMETERS.items()
    if parameter.of_batch is not None
}
_PLANES: Final = tuple(
    name for name, parameter in SAMPLING_PARAMETERS.items() if parameter.dims == ("batch", "vocab")
)


class SamplingBuffers:
    """Memory for the largest batch, one array a parameter, of which a step uses the beginning.

    A CPU's graph reads the host's arrays. Another device has one of its own for each, into which a
    step copies what changed, so that the two always agree.

    Args:
        max_batch_size: most rows in one step.
        max_positions: most positions of a row in one step, K + 1.
        device: where the graph reads them.
    """

    def __init__(
        self, max_batch_size: int, vocab_size: int, max_positions: int, device: Device
    ) -> None:
        rows, self._words = max_batch_size, -(-vocab_size // 32)
        self._host: dict[str, npt.NDArray[Any]] = {
            **{name: _zeros(name, rows) for name in PER_ROW},
            **{name: _zeros(name, rows, vocab_size) for name in _PLANES},
            BITMASK: np.full(rows * max_positions * self._words, -1, np.int32),
        }
        self._staged = {name: Buffer.from_numpy(array) for name, array in self._host.items()}
        self._sent = self._staged
        if not device.is_host:
            self._sent = {name: staged.to(device) for name, staged in self._staged.items()}
        self._scalars = {name: _zeros(name) for name in _SCALARS}
        self._host_only = {name: Buffer.from_numpy(array) for name, array in self._scalars.items()}
        self._used: dict[str, set[int]] = {name: set() for name in _PLANES}
        self._dirty_words = 0

    def bitmask(self, batch_size: int, positions: int) -> npt.NDArray[np.int32]:
        """The grammar masks of the next step, all allowed: int32 `[B, positions, V / 32]`.

        The caller clears bits in it before `fill`.
        """
        size = batch_size * positions * self._words
        self._host[BITMASK][: self._dirty_words] = -1
        self._dirty_words = size
        return self._host[BITMASK][:size].reshape(batch_size, positions, self._words)

    def fill(
        self, rows: Sequence[RowSampling], bitmask: npt.NDArray[np.int32]
    ) -> dict[str, Buffer]:
        """Writes a batch's parameters; returns them by name, in the order of `SamplingFields`.

        Args:
            rows: the parameters of each row.
            bitmask: what `bitmask` gave for this step.
        """
        count = len(rows)
        changed = {name: count for name in PER_ROW} | {BITMASK: bitmask.size}
        for name in PER_ROW:
            self._host[name][:count] = [getattr(row, name) for row in rows]
        for name in _PLANES:
            changed[name] = self._write_plane(name, [getattr(row, name) for row in rows])
        for name, of_batch in _SCALARS.items():
            self._scalars[name][...] = of_batch(rows)
        if self._sent is not self._staged:
            self._copy({name: size for name, size in changed.items() if size})
        views = {name: _beginning(self._sent[name], count) for name in (*PER_ROW, *_PLANES)}
        mask = _beginning(self._sent[BITMASK], bitmask.size).view(DType.int32, bitmask.shape)
        filled = {**self._host_only, **views, BITMASK: mask}
        return {name: filled[name] for name in SAMPLING_PARAMETERS}

    def _write_plane(self, name: str, rows: Sequence[npt.NDArray[Any] | None]) -> int:
        """Makes a plane the batch's, zero for rows without one; returns up to where it changed."""
        plane, before = self._host[name], self._used[name]
        now = {index for index, row in enumerate(rows) if row is not None}
        plane[list(before - now)] = 0
        for index in now:
            plane[index] = rows[index]
        self._used[name] = now
        return max(before | now, default=-1) + 1

    def _copy(self, sizes: dict[str, int]) -> None:
        """Copies the beginnings of these arrays to the device."""
        batch_inplace_copy(
            [_beginning(self._sent[name], size) for name, size in sizes.items()],
            [_beginning(self._staged[name], size) for name, size in sizes.items()],
        )


def _zeros(name: str, *shape: int) -> npt.NDArray[Any]:
    return np.zeros(shape, SAMPLING_PARAMETERS[name].dtype.to_numpy())


def _beginning(buffer: Buffer, size: int) -> Buffer:
    """A view of the first entries of the first axis."""
    other_axes = [slice(None)] * (len(buffer.shape) - 1)
    return buffer[(slice(0, size), *other_axes)]
