"""What a draft has not read: a step that proposes nothing may log it for a later one to read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Self

from max.dtype import DType
from max.graph import (
    BufferType,
    BufferValue,
    DeviceRef,
    TensorType,
    TensorValue,
    Value,
    ops,
)
from max.nn.kv_cache import PagedCacheValues

from unispec.kv_cache.views import earlier_view

__all__ = ["DEFERRED_INPUTS", "DeferredInputs", "FeatureType", "Unread", "deferred_types"]

DEFERRED_INPUTS = (
    "feature_log",
    "logged_features",
    "log_start",
    "num_logged",
    "deferred_rows",
    "deferred_tokens",
    "deferred_counts",
    "max_deferred",
    "unread_places",
    "unread_offsets",
)
"""The inputs of a graph whose draft need not read in each step, in order."""


class FeatureType(NamedTuple):
    """What a draft reads of a position, before any projection of its own."""

    width: int
    """F."""
    dtype: DType
    """The target's."""


def deferred_types(
    features: FeatureType, device: DeviceRef
) -> dict[str, Sequence[TensorType | BufferType]]:
    """Graph input types of `DEFERRED_INPUTS`."""
    cpu = DeviceRef.CPU()
    log = BufferType(features.dtype, ["num_log_rows", features.width], device=device)
    return {
        "feature_log": [log],
        "logged_features": [TensorType(log.dtype, log.shape, device=device)],
        "log_start": [TensorType(DType.int64, [], device=cpu)],
        "num_logged": [TensorType(DType.int64, [], device=cpu)],
        "deferred_rows": [TensorType(DType.int64, ["num_deferred"], device=device)],
        "deferred_tokens": [TensorType(DType.int64, ["num_deferred"], device=device)],
        "deferred_counts": [TensorType(DType.uint32, ["batch"], device=device)],
        "max_deferred": [TensorType(DType.uint32, [1], device=cpu)],
        "unread_places": [TensorType(DType.int64, ["num_unread"], device=device)],
        "unread_offsets": [TensorType(DType.uint32, ["num_row_offsets"], device=device)],
    }


@dataclass(frozen=True)
class Unread:
    """What the draft reads in a step: U positions, ragged."""

    tokens: TensorValue
    """int64 `[U]`: the verified token that follows each position."""
    features: TensorValue
    """`[U, F]`: the target's."""
    row_offsets: TensorValue
    """uint32 `[B + 1]`."""
    last_verified: TensorValue
    """int64 `[B]`: where each row's last verified position is among them."""
    cache: PagedCacheValues
    """The draft's cache as far as the draft has read."""


@dataclass(frozen=True)
class DeferredInputs:
    """The positions that the draft has not read: E of all rows, ragged. L rows of the log.

    The host says where each of a step's U positions is, each row's deferred ones before its M
    merged ones, so that a step whose draft does not read computes nothing of it.
    """

    log: BufferValue
    """`[L, F]`: features of the target, to be written to."""
    logged: TensorValue
    """`[L, F]`: the same memory, to be read from: a loaded buffer would be a copy. No step does
    both."""
    start: TensorValue
    """int64 scalar on the CPU: the row of the log where the step writes."""
    num_logged: TensorValue
    """int64 scalar on the CPU: how many features it writes, M, or 0 where the draft reads."""
    rows: TensorValue
    """int64 `[E]`: the log's row of each position."""
    tokens: TensorValue
    """int64 `[E]`: the verified token that follows each position."""
    counts: TensorValue
    """uint32 `[B]`: positions of each row."""
    longest: TensorValue
    """uint32 `[1]` on the CPU: the largest of them."""
    places: TensorValue
    """int64 `[U]`: of what the draft reads, indices among deferred and, behind them, merged
    positions."""
    offsets: TensorValue
    """uint32 `[B + 1]`: where each row starts in `places`."""

    @classmethod
    def of(cls, taken: Mapping[str, Sequence[Value[Any]]]) -> Self:
        """Those among the inputs of a graph, by name."""
        (log,), *others = (taken[name] for name in DEFERRED_INPUTS)
        return cls(log.buffer, *(value.tensor for (value,) in others))

    @property
    def reads(self) -> TensorValue:
        """Whether the draft reads in this step, a bool scalar on the CPU."""
        return self.num_logged == 0

    def write(self, features: TensorValue) -> None:
        """Writes the first of `[M, F]`, the merged positions' features, to the log."""
        end = self.start + self.num_logged
        rows = ops.slice_tensor(features, [(slice(0, self.num_logged), "num_logged"), slice(None)])
        ops.buffer_store_slice(
            self.log, rows, [(slice(self.start, end), "num_logged"), slice(None)]
        )

    def before(self, merged: Unread) -> Unread:
        """The deferred positions of each row, then its merged ones."""
        features = ops.concat([ops.gather(self.logged, self.rows, axis=0), merged.features])
        tokens = ops.concat([self.tokens, merged.tokens])
        starts = ops.rebind(self.offsets[:-1], self.counts.shape) + self.counts
        moved = starts - ops.rebind(merged.row_offsets[:-1], self.counts.shape)
        return Unread(
            tokens=ops.gather(tokens, self.places, axis=0),
            features=ops.gather(features, self.places, axis=0),
            row_offsets=self.offsets,
            last_verified=merged.last_verified + moved.cast(DType.int64),
            cache=earlier_view(merged.cache, self.counts, self.longest),
        )
