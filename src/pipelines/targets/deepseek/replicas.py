"""Devices whose attention is data-parallel: each has some of a batch's rows, and their cache."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from max.dtype import DType
from max.graph import DeviceRef, Dim, DimLike, TensorValue, Value, ops
from max.nn.kv_cache import PagedCacheValues
from typing_extensions import Self

from unispec.kv_cache.views import on_device_of
from unispec.pipelines.speculative.step import StepInputs

from .mesh import Communication, DeviceInputs, Mesh

__all__ = ["Replicas", "mesh_of"]


def mesh_of(step: StepInputs, cache: int) -> Mesh:
    """The devices of a step and their copies of one of its caches.

    Args:
        cache: which of its caches, 0 for the target's and 1 for the draft's.
    """
    copies = step.copies[cache]
    shared: dict[str, Any] = {
        "signal_buffers": [value.buffer for value in step.extra["signal_buffers"]],
        "copies": copies if len(copies) > 1 else (),
        "context_lengths": [value.tensor for value in step.extra["batch_context_lengths"]],
    }
    if not step.extra["ep_inputs"]:
        return Mesh(**shared)
    return Replicas.of(step, step.caches[cache], shared)


@dataclass(frozen=True, kw_only=True)
class Replicas(Mesh):
    """Devices that have the attention of every layer whole, and some of its experts.

    A layer's rows go to their replicas and come back; all that is no layer runs on the first
    device alone, for all rows. Embedding and head are shared as in `Mesh`.
    """

    ep_inputs: Sequence[Value[Any]]
    """Where devices send tokens to each other's experts, see `max.nn.comm.ep`."""
    cache: PagedCacheValues
    """The stack's cache, as the first device sees it."""
    row_splits: TensorValue
    """int64 `[replicas + 1]` on the host: where each replica's rows start."""
    token_splits: TensorValue
    """int64 `[replicas + 1]` on the host: where each replica's merged tokens start."""

    @classmethod
    def of(cls, step: StepInputs, cache: PagedCacheValues, shared: dict[str, Any]) -> Self:
        """The replicas of a step and of one of its caches, given the fields of `Mesh`."""
        (row_splits,) = step.extra["data_parallel_splits"]
        (row_offsets,) = step.extra["host_input_row_offsets"]
        splits = row_splits.tensor
        # The host knows where tokens start, and that every row has as many drafts.
        drafts = ops.shape_to_tensor([step.draft_tokens.shape[1]])
        tokens = ops.gather(row_offsets.tensor.cast(DType.int64), splits, axis=0)
        return cls(
            **shared,
            ep_inputs=step.extra["ep_inputs"],
            cache=cache,
            row_splits=splits,
            token_splits=tokens + splits * drafts,
        )

    @property
    def communication(self) -> Communication:
        """A layer sums nothing: a token's attention and experts are whole on its device."""
        return Communication([], list(self.ep_inputs))

    def scatter(
        self, xs: Sequence[TensorValue], row_offsets: TensorValue, cache: PagedCacheValues
    ) -> DeviceInputs:
        """What each device works on: its rows; arguments as in `Mesh.scatter`.

        T is the step's merged tokens, or one token a row.
        """
        one_a_row = xs[0].shape[0] == cache.cache_lengths.shape[0]
        own_xs, offsets = [], []
        for index, (device, rows) in enumerate(self._replicas()):
            x = xs[min(index, len(xs) - 1)]
            if one_a_row:
                own_xs.append(_cut(x, self.row_splits, index, rows).to(device))
                # Made anew: in a loop there can be no other dimensions than those of the batch.
                offsets.append(_ramp(rows + 1, device))
            else:
                own_xs.append(_cut(x, self.token_splits, index, f"tokens_{index}").to(device))
                own = _cut(row_offsets, self.row_splits, index, f"row_offsets_{index}", overlap=1)
                offsets.append((own - own[0]).to(device))
        return DeviceInputs(own_xs, offsets, self._caches(cache))

    def gather(self, xs: Sequence[TensorValue], like: TensorValue) -> TensorValue:
        """The rows of all devices one after the other, on the first one; see `Mesh.gather`."""
        first = xs[0]
        joined = ops.concat([x.to(first.device) for x in xs])
        return ops.rebind(joined, [like.shape[0], *first.shape[1:]])

    def _caches(self, view: PagedCacheValues) -> list[PagedCacheValues]:
        if view is self.cache:
            return list(self.copies)
        return [
            on_device_of(
                copy, view, _cut(view.cache_lengths, self.row_splits, index, rows).to(device)
            )
            for index, (copy, (device, rows)) in enumerate(
                zip(self.copies, self._replicas(), strict=True)
            )
        ]

    def _replicas(self) -> Iterator[tuple[DeviceRef, Dim]]:
        """Each one's device and number of rows."""
        for copy in self.copies:
            yield copy.cache_lengths.device, copy.cache_lengths.shape[0]


def _cut(
    x: TensorValue, splits: TensorValue, index: int, size: DimLike, overlap: int = 0
) -> TensorValue:
    """Part `index` of `[T, ...]`, with the first `overlap` rows of the next: `[size, ...]`."""
    part = slice(splits[index], splits[index + 1] + overlap)
    return ops.slice_tensor(x, [(part, size), ...])


def _ramp(size: Dim, device: DeviceRef) -> TensorValue:
    """uint32 `[size]`: 0, 1, 2, ..."""
    return ops.range(0, size, 1, out_dim=size, dtype=DType.uint32, device=device)
