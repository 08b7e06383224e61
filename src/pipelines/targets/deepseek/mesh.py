"""The devices of a step: what each of them works on, and how they exchange values."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final, NamedTuple

from max.graph import BufferValue, TensorValue, Value, ops
from max.nn import ColumnParallelLinear, Embedding, Linear, VocabParallelEmbedding
from max.nn.kv_cache import PagedCacheValues

from unispec.kv_cache.views import on_device_of

__all__ = ["ALONE", "Communication", "DeviceInputs", "Mesh"]


class Communication(NamedTuple):
    """What the devices exchange values through inside a layer."""

    signal_buffers: list[BufferValue]
    """uint8, one a device, where what the devices made of a layer is summed; else empty."""
    ep_inputs: list[Value[Any]]
    """Of `max.nn.comm.ep`, where each device has some of the experts; empty where it has none."""

    def sum(self, changes: Sequence[TensorValue]) -> list[TensorValue]:
        """What each device adds to its `[T, H]`: the sum of all devices' changes, or its own."""
        if not self.signal_buffers:
            return list(changes)
        return ops.allreduce.sum(changes, self.signal_buffers)


class DeviceInputs(NamedTuple):
    """What each device works on; all lists by device."""

    xs: list[TensorValue]
    """`[T, H]`, ragged."""
    row_offsets: list[TensorValue]
    """uint32 `[B + 1]`."""
    caches: list[PagedCacheValues]
    """The stack's, for the same rows."""


@dataclass(frozen=True)
class Mesh:
    """The devices that share every layer of a stack by tensor parallelism.

    Between two layers all of them have the same hidden states, so all that is no layer runs on
    the first one alone.
    """

    signal_buffers: Sequence[BufferValue] = ()
    """uint8, one a device: where they signal each other; empty for one device."""
    copies: Sequence[PagedCacheValues] = ()
    """The stack's cache as every device has it, the first device's first; empty for one device."""
    context_lengths: Sequence[TensorValue] = ()
    """int32 `[1]` on the host, one a device: cached tokens that a prefill may read, in pages."""

    @property
    def communication(self) -> Communication:
        """What a layer exchanges values through."""
        return Communication(list(self.signal_buffers), [])

    def scatter(
        self, xs: Sequence[TensorValue], row_offsets: TensorValue, cache: PagedCacheValues
    ) -> DeviceInputs:
        """What each device works on: here all of it.

        Args:
            xs: `[T, H]`, ragged, on every device or on the first one.
            row_offsets: uint32 `[B + 1]`, on the first device.
            cache: the first device's, or a `grown_view` of it.
        """
        copies = list(xs) if len(xs) > 1 else self.broadcast(xs[0])
        return DeviceInputs(copies, self.broadcast(row_offsets), self._caches(cache))

    def gather(self, xs: Sequence[TensorValue], like: TensorValue) -> TensorValue:
        """What the devices made of what was scattered, on the first one.

        Args:
            xs: one a device.
            like: `[T, ...]`, what was scattered; its T is the result's.
        """
        return xs[0]

    def broadcast(self, value: TensorValue) -> list[TensorValue]:
        """A value of the first device, on each of them."""
        if not self.signal_buffers:
            return [value]
        return ops.distributed_broadcast(value, self.signal_buffers)

    def _caches(self, view: PagedCacheValues) -> list[PagedCacheValues]:
        """The first device's view of the cache, as each of them sees it."""
        if not self.copies:
            return [view]
        first, *others = self.copies
        if view is first:
            return list(self.copies)
        _, *lengths = self.broadcast(view.cache_lengths)
        return [
            view,
            *(on_device_of(copy, view, own) for copy, own in zip(others, lengths, strict=True)),
        ]

    def embed(
        self, embedding: Embedding | VocabParallelEmbedding, tokens: TensorValue
    ) -> list[TensorValue]:
        """`[T, H]` on each device for int64 `[T]` on the first.

        Args:
            embedding: on one device, or a part of its rows on each.
        """
        if isinstance(embedding, VocabParallelEmbedding):
            return embedding(tokens, self.signal_buffers)
        return [embedding(tokens)]

    def project(self, head: Linear, hidden: TensorValue) -> TensorValue:
        """`[..., V]` for `[..., H]`, on the first device.

        Args:
            head: on one device, or a part of its rows on each.
        """
        if isinstance(head, ColumnParallelLinear):
            return head(self.broadcast(hidden), self.signal_buffers)[0]
        return head(hidden)


ALONE: Final = Mesh()
"""One device, for a stack that is not part of a step."""
