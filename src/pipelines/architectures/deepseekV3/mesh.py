"""The devices of a step: how values reach all of them, and how their parts become one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from max.graph import BufferValue, TensorValue, ops
from max.nn import ColumnParallelLinear, Embedding, Linear, VocabParallelEmbedding
from max.nn.kv_cache import PagedCacheValues
from typing_extensions import Self

from unispec.kv_cache.views import on_device_of
from unispec.pipelines.speculative.step import StepInputs

__all__ = ["ALONE", "Mesh"]


@dataclass(frozen=True)
class Mesh:
    """The devices that share every layer of a stack.

    Between two layers all of them have the same hidden states, so all that is no layer runs on
    the first one alone.
    """

    signal_buffers: Sequence[BufferValue] = ()
    """uint8, one a device: where they signal each other; empty for one device."""
    copies: Sequence[PagedCacheValues] = ()
    """The stack's cache as every device has it, the first device's first; empty for one device."""
    context_lengths: Sequence[TensorValue] = ()
    """int32 `[1]` on the host, one a device: cached tokens that a prefill may read, in pages."""

    @classmethod
    def of(cls, step: StepInputs, cache: int) -> Self:
        """The devices of a step and their copies of one of its caches.

        Args:
            step: the step's inputs.
            cache: which of its caches, 0 for the target's and 1 for the draft's.
        """
        copies = step.copies[cache]
        return cls(
            signal_buffers=[value.buffer for value in step.more["signal_buffers"]],
            copies=copies if len(copies) > 1 else (),
            context_lengths=[value.tensor for value in step.more["batch_context_lengths"]],
        )

    def spread(self, value: TensorValue) -> list[TensorValue]:
        """A value of the first device, on each of them.

        Args:
            value: of any shape and dtype.
        """
        if not self.signal_buffers:
            return [value]
        return ops.distributed_broadcast(value, self.signal_buffers)

    def sum(self, parts: Sequence[TensorValue]) -> list[TensorValue]:
        """The sum of all devices' parts, on each of them.

        Args:
            parts: one a device, of equal shapes.
        """
        if not self.signal_buffers:
            return list(parts)
        return ops.allreduce.sum(parts, self.signal_buffers)

    def caches(self, view: PagedCacheValues) -> list[PagedCacheValues]:
        """The first device's view of the cache, as each of them sees it.

        Args:
            view: the cache, or a `grown_view` of it.
        """
        if not self.copies:
            return [view]
        first, *others = self.copies
        if view is first:
            return list(self.copies)
        _, *lengths = self.spread(view.cache_lengths)
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
            hidden: on the first device.
        """
        if isinstance(head, ColumnParallelLinear):
            return head(self.spread(hidden), self.signal_buffers)[0]
        return head(hidden)


ALONE: Final = Mesh()
"""One device, for a stack that is not part of a step."""
