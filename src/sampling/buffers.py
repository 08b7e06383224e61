"""Persistent host-to-device buffers of the sampling parameters."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any, Final

import numpy as np
import numpy.typing as npt
from max.driver import Buffer, Device, batch_inplace_copy
from max.dtype import DType

from .inputs import SamplingInputs

__all__ = ["RowSampling", "SamplingBuffers"]

_PER_ROW: Final[dict[str, type[np.generic]]] = {
    "seed": np.uint64,
    "temperature": np.float32,
    "top_k": np.int64,
    "top_p": np.float32,
    "min_p": np.float32,
    "presence_penalty": np.float32,
    "frequency_penalty": np.float32,
    "repetition_penalty": np.float32,
}
_PLANES: Final[dict[str, type[np.generic]]] = {"token_counts": np.int32, "logit_bias": np.float32}
_BITMASK: Final = "token_bitmask"


@dataclass
class RowSampling:
    """One request's sampling parameters and what it has seen, in the graph's terms.

    The arrays stay with the request; a step only copies those of rows that use them.
    """

    seed: int
    """Taken modulo 2**64."""
    temperature: float = 0.0
    """0 is greedy."""
    top_k: int = 0
    """0 is no limit."""
    top_p: float = 1.0
    """1 is no limit."""
    min_p: float = 0.0
    """0 is no limit."""
    presence_penalty: float = 0.0
    """0 is none."""
    frequency_penalty: float = 0.0
    """0 is none."""
    repetition_penalty: float = 1.0
    """1 is none."""
    token_counts: npt.NDArray[np.int32] | None = None
    """`[V]`, only where a penalty is on: generated count, -1 for prompt tokens."""
    logit_bias: npt.NDArray[np.float32] | None = None
    """`[V]`, only where the request biases tokens."""

    def __post_init__(self) -> None:
        self.seed &= 2**64 - 1

    def count(self, token: int) -> None:
        """Counts one generated token."""
        if self.token_counts is not None:
            self.token_counts[token] = max(int(self.token_counts[token]), 0) + 1


class SamplingBuffers:
    """Memory for the largest batch, one array a parameter, of which a step uses the beginning.

    A CPU's graph reads the host's arrays. Another device has one of its own for each, into which a
    step copies what changed, so that the two always agree.

    Args:
        max_batch_size: most rows in one step.
        vocab_size: V.
        max_positions: most positions of a row in one step, K + 1.
        device: where the graph reads them.
    """

    def __init__(
        self, max_batch_size: int, vocab_size: int, max_positions: int, device: Device
    ) -> None:
        rows, self._words = max_batch_size, -(-vocab_size // 32)
        self._host: dict[str, npt.NDArray[Any]] = {
            **{name: np.zeros(rows, dtype) for name, dtype in _PER_ROW.items()},
            **{name: np.zeros((rows, vocab_size), dtype) for name, dtype in _PLANES.items()},
            _BITMASK: np.full(rows * max_positions * self._words, -1, np.int32),
        }
        self._staged = {name: Buffer.from_numpy(array) for name, array in self._host.items()}
        self._sent = self._staged
        if not device.is_host:
            self._sent = {name: staged.to(device) for name, staged in self._staged.items()}
        self._of_batch: dict[str, npt.NDArray[Any]] = {
            "max_temperature": np.zeros((), np.float32),
            "max_k": np.zeros((), np.int64),
            "min_top_p": np.ones((), np.float32),
            "num_penalised": np.zeros((), np.int64),
        }
        self._host_only = {name: Buffer.from_numpy(array) for name, array in self._of_batch.items()}
        self._used: dict[str, set[int]] = {name: set() for name in _PLANES}
        self._dirty_words = 0

    def bitmask(self, batch_size: int, positions: int) -> npt.NDArray[np.int32]:
        """The grammar masks of the next step, all allowed: int32 `[B, positions, V / 32]`.

        The caller clears bits in it before `fill`.

        Args:
            batch_size: B.
            positions: of each row, K + 1.
        """
        size = batch_size * positions * self._words
        self._host[_BITMASK][: self._dirty_words] = -1
        self._dirty_words = size
        return self._host[_BITMASK][:size].reshape(batch_size, positions, self._words)

    def fill(self, rows: Sequence[RowSampling], bitmask: npt.NDArray[np.int32]) -> list[Buffer]:
        """Writes a batch's parameters; returns them in the order of `SamplingInputs`.

        Args:
            rows: the parameters of each row.
            bitmask: what `bitmask` gave for this step.
        """
        count = len(rows)
        changed = {name: count for name in _PER_ROW} | {_BITMASK: bitmask.size}
        for name in _PER_ROW:
            self._host[name][:count] = [getattr(row, name) for row in rows]
        for name in _PLANES:
            changed[name] = self._write_plane(name, [getattr(row, name) for row in rows])
        scalars = self._of_batch
        scalars["max_temperature"][...] = max((row.temperature for row in rows), default=0.0)
        scalars["max_k"][...] = max((row.top_k for row in rows), default=0)
        scalars["min_top_p"][...] = min((row.top_p for row in rows), default=1.0)
        scalars["num_penalised"][...] = sum(row.token_counts is not None for row in rows)
        if self._sent is not self._staged:
            self._copy({name: size for name, size in changed.items() if size})
        views = {name: _beginning(self._sent[name], count) for name in (*_PER_ROW, *_PLANES)}
        mask = _beginning(self._sent[_BITMASK], bitmask.size).view(DType.int32, bitmask.shape)
        named = {**self._host_only, **views, _BITMASK: mask}
        return [named[field.name] for field in fields(SamplingInputs)]

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


def _beginning(buffer: Buffer, size: int) -> Buffer:
    """A view of the first entries of the first axis."""
    whole = [slice(None)] * (len(buffer.shape) - 1)
    return buffer[(slice(0, size), *whole)]
