"""What a draft has not read: a step without proposals logs it, the next one with some reads it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Self

from max.dtype import DType
from max.graph import (
    BufferType,
    BufferValue,
    DeviceRef,
    Dim,
    TensorType,
    TensorValue,
    Value,
    ops,
)
from max.nn.kernels import merge_ragged_tensors
from max.nn.kv_cache import PagedCacheValues

from unispec.kv_cache.views import earlier_view
from unispec.sampling.branch import run_if

__all__ = ["DEFERRED_INPUTS", "DeferredInputs", "FeatureType", "Unread", "deferred_types"]

DEFERRED_INPUTS = (
    "feature_log",
    "log_start",
    "deferred_rows",
    "deferred_offsets",
    "deferred_tokens",
    "max_deferred",
)
"""The inputs of a graph whose draft need not run in each step, in order."""


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
        "log_start": [TensorType(DType.int64, [], device=cpu)],
        "deferred_rows": [TensorType(DType.int64, ["num_deferred"], device=device)],
        "deferred_offsets": [TensorType(DType.uint32, ["num_row_offsets"], device=device)],
        "deferred_tokens": [TensorType(DType.int64, ["num_deferred"], device=device)],
        "max_deferred": [TensorType(DType.uint32, [1], device=cpu)],
    }


@dataclass(frozen=True)
class DeferredInputs:
    """The positions that the draft has not read: E of all rows, ragged. L rows of the log."""

    log: BufferValue
    """`[L, F]`: features of the target."""
    log_start: TensorValue
    """int64 scalar on the CPU: where a step that proposes nothing writes its M features; -1:
    nowhere."""
    rows: TensorValue
    """int64 `[E]`: the log's row of each position."""
    offsets: TensorValue
    """uint32 `[B + 1]`: where the positions of each row start."""
    tokens: TensorValue
    """int64 `[E]`: the verified token that follows each position."""
    longest: TensorValue
    """uint32 `[1]` on the CPU: the most positions of a row."""

    @classmethod
    def of(cls, taken: Mapping[str, Sequence[Value[Any]]]) -> Self:
        """Those among the inputs of a graph, by name."""
        (log,), *others = (taken[name] for name in DEFERRED_INPUTS)
        return cls(log.buffer, *(value.tensor for (value,) in others))


@dataclass(frozen=True)
class Unread:
    """What the draft reads in a step. U positions: each row's deferred ones, then its merged ones.

    In a graph without deferred inputs the draft runs in each step, over the merged tokens alone.
    """

    tokens: TensorValue
    """int64 `[U]`: the verified token that follows each position."""
    row_offsets: TensorValue
    """uint32 `[B + 1]`."""
    last_verified: TensorValue
    """int64 `[B]`: where each row's last verified position is among them."""
    cache: PagedCacheValues
    """The draft's cache as far as the draft has read."""
    features: Callable[[], TensorValue]
    """Gathers the target's features, `[U, F]`."""
    proposes: TensorValue | None = None
    """bool scalar on the CPU: whether the draft runs; None: it does in each step."""

    def branch(
        self,
        run: Callable[[], Sequence[TensorValue]],
        otherwise: Callable[[], Sequence[TensorValue]],
    ) -> list[TensorValue]:
        """What `run` builds where the draft runs, else `otherwise`, of the same types."""
        if self.proposes is None:
            return list(run())
        return run_if(self.proposes, otherwise(), lambda *_: run())

    def with_deferred(
        self, deferred: DeferredInputs, num_proposed: TensorValue, batch: Dim
    ) -> Self:
        """Puts deferred positions before each row's merged ones, or logs these for a later step.

        Args:
            num_proposed: int64 scalar on the CPU; 0: the draft does not run.
            batch: B.
        """
        features = self.features()  # [M, F]
        _log(features, deferred, num_proposed)
        device = features.device
        count, merged = deferred.rows.shape[0], features.shape[0]  # E, M
        # Where a position's features are among the deferred ones and, after them, the merged ones.
        places = [
            ops.range(0, size, 1, out_dim=size, dtype=DType.int64, device=device)
            for size in (count, merged)
        ]
        behind = places[1] + ops.shape_to_tensor([count]).to(device)
        offsets = (deferred.offsets, ops.rebind(self.row_offsets, deferred.offsets.shape))
        sources, _ = merge_ragged_tensors(places[0], offsets[0], behind, offsets[1])
        tokens, _ = merge_ragged_tensors(deferred.tokens, offsets[0], self.tokens, offsets[1])
        # In max 26.7 the operation's own offsets are wrong where a row has nothing deferred.
        row_offsets = offsets[0] + offsets[1]
        before = ops.rebind(deferred.offsets[1:], [batch])  # deferred ones up to each row's end
        counts = before - ops.rebind(deferred.offsets[:-1], [batch])
        old = _read(deferred, num_proposed)  # [E, F]

        def gathered() -> TensorValue:
            found = ops.gather(ops.concat([old, features]), sources, axis=0)
            return ops.rebind(found, ["num_unread", features.shape[1]])

        return type(self)(
            # Plain names: a loop's body takes no computed dimensions.
            ops.rebind(tokens, ["num_unread"]),
            row_offsets,
            self.last_verified + before.cast(DType.int64),
            earlier_view(self.cache, counts, deferred.longest),
            features=gathered,
            proposes=num_proposed > 0,
        )


def _log(features: TensorValue, deferred: DeferredInputs, num_proposed: TensorValue) -> None:
    """Writes the merged tokens' features `[M, F]` to the log, if nothing is proposed."""
    merged, start = features.shape[0], deferred.log_start
    end = start + ops.shape_to_tensor([merged]).reshape([])

    def write(start: TensorValue) -> list[TensorValue]:
        rows = (slice(start, end), merged)
        ops.buffer_store_slice(deferred.log, features, [rows, slice(None)])
        return [start]

    run_if((num_proposed == 0) & (start >= 0), [start], write)


def _read(deferred: DeferredInputs, num_proposed: TensorValue) -> TensorValue:
    """The features of the deferred positions, `[E, F]`.

    The log is loaded where there are some only: that copies it.
    """
    log, count = deferred.log, deferred.rows.shape[0]
    nothing = ops.broadcast_to(
        ops.constant(0.0, log.dtype, device=log.device), [count, log.shape[1]]
    )

    def read(nothing: TensorValue) -> list[TensorValue]:
        found = ops.gather(ops.buffer_load(log), deferred.rows, axis=0)
        return [ops.rebind(found, nothing.shape)]

    some = ops.shape_to_tensor([count]).reshape([]) > 0
    return run_if(some & (num_proposed > 0), [nothing], read)[0]
