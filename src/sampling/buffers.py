"""Persistent host-to-device buffers of the sampling parameters."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from max.driver import Buffer, Device

__all__ = ["RowSampling", "SamplingBuffers"]


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

    def count(self, token: int) -> None:
        """Counts one generated token."""
        if self.token_counts is not None:
            self.token_counts[token] = max(int(self.token_counts[token]), 0) + 1


class SamplingBuffers:
    """Host arrays for the largest batch, filled in place; a CPU's graph reads them as they are.

    Args:
        max_batch_size: most rows in one step.
        vocab_size: V.
        max_positions: most positions of a row in one step, K + 1.
        device: where the graph reads them.
    """

    def __init__(
        self, max_batch_size: int, vocab_size: int, max_positions: int, device: Device
    ) -> None:
        self._device = device
        self._words = -(-vocab_size // 32)
        rows = max_batch_size
        self._seed = np.zeros(rows, np.uint64)
        self._top_k = np.zeros(rows, np.int64)
        self._floats = np.zeros((6, rows), np.float32)
        self._max_temperature = np.zeros((), np.float32)
        self._num_penalised = np.zeros((), np.int64)
        self._max_k = np.zeros((), np.int64)
        self._min_top_p = np.ones((), np.float32)
        self._counts = np.zeros((rows, vocab_size), np.int32)
        self._bias = np.zeros((rows, vocab_size), np.float32)
        self._bitmask = np.full(rows * max_positions * self._words, -1, np.int32)
        self._dirty_planes = [False, False]
        self._dirty_words = 0
        self._sent: dict[tuple[str, tuple[int, ...]], Buffer] = {}

    def bitmask(self, batch_size: int, positions: int) -> npt.NDArray[np.int32]:
        """The grammar masks of the next step, all allowed: int32 `[B, positions, V / 32]`.

        The caller clears bits in it before `fill`.

        Args:
            batch_size: B.
            positions: of each row, K + 1.
        """
        size = batch_size * positions * self._words
        self._bitmask[: self._dirty_words] = -1
        self._dirty_words = size
        return self._bitmask[:size].reshape(batch_size, positions, self._words)

    def fill(self, rows: Sequence[RowSampling], bitmask: npt.NDArray[np.int32]) -> list[Buffer]:
        """Writes a batch's parameters; returns them in the order of `SamplingInputs`.

        Args:
            rows: the parameters of each row.
            bitmask: what `bitmask` gave for this step.
        """
        count = len(rows)
        seed, top_k, floats = self._seed[:count], self._top_k[:count], self._floats[:, :count]
        for index, row in enumerate(rows):
            seed[index] = row.seed & 0xFFFF_FFFF_FFFF_FFFF
            top_k[index] = row.top_k
            floats[:, index] = (
                row.temperature,
                row.top_p,
                row.min_p,
                row.presence_penalty,
                row.frequency_penalty,
                row.repetition_penalty,
            )
        self._max_temperature[...] = max((row.temperature for row in rows), default=0.0)
        self._num_penalised[...] = sum(row.token_counts is not None for row in rows)
        self._max_k[...] = max((row.top_k for row in rows), default=0)
        self._min_top_p[...] = min((row.top_p for row in rows), default=1.0)
        were_dirty = list(self._dirty_planes)
        counts = self._plane(0, self._counts, [row.token_counts for row in rows])
        bias = self._plane(1, self._bias, [row.logit_bias for row in rows])
        temperature, top_p, min_p, presence, frequency, repetition = self._floats
        return [
            self._send("seed", seed),
            self._send("temperature", temperature[:count]),
            self._host("max_temperature", self._max_temperature),
            self._send("top_k", top_k),
            self._host("max_k", self._max_k),
            self._send("top_p", top_p[:count]),
            self._host("min_top_p", self._min_top_p),
            self._send("min_p", min_p[:count]),
            self._send("presence", presence[:count]),
            self._send("frequency", frequency[:count]),
            self._send("repetition", repetition[:count]),
            self._host("num_penalised", self._num_penalised),
            self._send("counts", counts, unchanged=not (were_dirty[0] or self._dirty_planes[0])),
            self._send("bias", bias, unchanged=not (were_dirty[1] or self._dirty_planes[1])),
            self._send("bitmask", bitmask),
        ]

    def _plane(
        self,
        which: int,
        plane: npt.NDArray[np.generic],
        rows: Sequence[npt.NDArray[np.generic] | None],
    ) -> npt.NDArray[np.generic]:
        """Copies the rows that have a plane; others are zero."""
        if self._dirty_planes[which]:
            plane[...] = 0
        self._dirty_planes[which] = any(row is not None for row in rows)
        for index, row in enumerate(rows):
            if row is not None:
                plane[index] = row
        return plane[: len(rows)]

    def _host(self, name: str, array: npt.NDArray[np.generic]) -> Buffer:
        key = (name, array.shape)
        if key not in self._sent:
            self._sent[key] = Buffer.from_numpy(array)
        return self._sent[key]

    def _send(
        self, name: str, array: npt.NDArray[np.generic], *, unchanged: bool = False
    ) -> Buffer:
        """A CPU reads the array itself; a GPU gets a copy, kept while nothing changes."""
        if self._device.is_host:
            return self._host(name, array)
        key = (name, array.shape)
        if not (unchanged and key in self._sent):
            self._sent[key] = Buffer.from_numpy(array).to(self._device)
        return self._sent[key]
