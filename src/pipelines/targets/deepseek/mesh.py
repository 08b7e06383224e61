"""The devices of a step: how values reach all of them, and how their parts become one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final, NamedTuple

from max.graph import BufferValue, TensorValue, Value, ops
from max.nn import ColumnParallelLinear, Embedding, Linear, VocabParallelEmbedding
from max.nn.kv_cache import PagedCacheValues

from unispec.kv_cache.views import on_device_of

__all__ = ["ALONE", "LayerInputs", "Mesh", "Parts"]


class LayerInputs(NamedTuple):
    """What the devices of a layer speak through."""

    signal_buffers: list[BufferValue]
    """uint8, one a device, where the layer's parts are summed; empty where they are not."""
    ep_inputs: list[Value[Any]]
    """Of `max.nn.comm.ep`, where each device has some of the experts; empty where it has none."""

    def sum(self, parts: Sequence[TensorValue]) -> list[TensorValue]:
        """What each device adds to its hidden states: the sum of all devices' parts, or its own.

        Args:
            parts: `[T, H]`, one a device.
        """
        if not self.signal_buffers:
            return list(parts)
        return ops.allreduce.sum(parts, self.signal_buffers)


class Parts(NamedTuple):
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
    def layer_inputs(self) -> LayerInputs:
        """What a layer needs to speak with the other devices."""
        return LayerInputs(list(self.signal_buffers), [])

    def parts(
        self, xs: Sequence[TensorValue], row_offsets: TensorValue, cache: PagedCacheValues
    ) -> Parts:
        """What each device works on: here all of it.

        Args:
            xs: `[T, H]`, ragged, on every device or on the first one.
            row_offsets: uint32 `[B + 1]`, on the first device.
            cache: the stack's cache, or a `grown_view` of it.
        """
        copies = list(xs) if len(xs) > 1 else self.everywhere(xs[0])
        return Parts(copies, self.everywhere(row_offsets), self._caches(cache))

    def whole(self, parts: Sequence[TensorValue], like: TensorValue) -> TensorValue:
        """What the devices made of their parts, on the first one.

        Args:
            parts: one a device.
            like: `[T, ...]`, whatever was parted; its T is the result's.
        """
        return parts[0]

    def everywhere(self, value: TensorValue) -> list[TensorValue]:
        """A value of the first device, on each of them.

        Args:
            value: of any shape and dtype.
        """
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
        _, *lengths = self.everywhere(view.cache_lengths)
        return [
            view,
            *(on_device_of(copy, view, own) for copy, own in zip(others, lengths, strict=True)),
        ]

    def embed(
        self, embedding: Embedding | VocabParallelEmbedding, tokens: TensorValue
    ) -> list[TensorValue]:
        """`[T, H]` for int64 `[T]`, on each device.

        Args:
            embedding: whole on one device, or a part of its rows on each.
            tokens: on the first device.
        """
        if isinstance(embedding, VocabParallelEmbedding):
            return embedding(tokens, self.signal_buffers)
        return [embedding(tokens)]

    def project(self, head: Linear, hidden: TensorValue) -> TensorValue:
        """`[..., V]` for `[..., H]`, on the first device.

        Args:
            head: whole on one device, or a part of its rows on each.
        """
        if isinstance(head, ColumnParallelLinear):
            return head(self.everywhere(hidden), self.signal_buffers)[0]
        return head(hidden)


ALONE: Final = Mesh()
"""One device, for a stack that is not part of a step."""
