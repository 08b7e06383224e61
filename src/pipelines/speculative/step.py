"""What goes into one step of a unified graph and what comes out, as graph values."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from max import tree
from max.dtype import DType
from max.graph import BufferType, DeviceRef, DimLike, TensorType, TensorValue, Value
from max.nn.kv_cache import KVCacheParamInterface, PagedCacheValues

from unispec.kv_cache.views import take_caches
from unispec.methods import LARGEST_DRAFT_TOKENS
from unispec.sampling.inputs import SamplingInputs

__all__ = [
    "MAX_BLOCK_SIZE",
    "MAX_DRAFT_TOKENS",
    "VOID_TOKEN",
    "StepInputs",
    "StepOutputs",
    "StepSignature",
]

MAX_DRAFT_TOKENS = LARGEST_DRAFT_TOKENS["eagle"]
"""Largest number of draft tokens that a sequential draft can propose in a step."""

MAX_BLOCK_SIZE = LARGEST_DRAFT_TOKENS["dflash"] + 1
"""Largest block of a block draft, the next token included."""

VOID_TOKEN = -1
"""Draft token of a row that has none to verify; no acceptance rule accepts it."""


@dataclass(frozen=True)
class StepInputs:
    """One step's inputs. B rows; T new tokens in all; K draft tokens a row."""

    tokens: TensorValue
    """int64 `[T]`: the new verified tokens of each row, ragged."""
    row_offsets: TensorValue
    """uint32 `[B + 1]`: where each row starts in `tokens`."""
    return_n_logits: TensorValue
    """int64 `[1]` on the CPU: logit rows per row, K + 1."""
    draft_tokens: TensorValue
    """int64 `[B, K]`: what the last step proposed; -1 where a row has nothing to verify."""
    known_next_tokens: TensorValue
    """int64 `[B]`: the token after a prefill chunk; -1 where the step decides it."""
    num_speculative_tokens: TensorValue
    """int64 scalar on the CPU: how many tokens to propose."""
    sampling: SamplingInputs
    """The sampling parameters of each row."""
    caches: Sequence[PagedCacheValues]
    """The target's cache, then the draft's if there is one."""
    draft_probs: TensorValue | None
    """float32 `[B, K, V]`: what `draft_tokens` were sampled from, for sampled drafts."""
    in_thinking_phase: TensorValue | None
    """bool `[B]`: rows inside a thinking block, for relaxed acceptance."""


@dataclass(frozen=True)
class StepOutputs:
    """One step's outputs."""

    num_accepted_draft_tokens: TensorValue
    """int64 `[B]`."""
    next_tokens: TensorValue
    """int64 `[B]`: the token after the accepted run."""
    next_draft_tokens: TensorValue
    """int64 `[B, num_speculative_tokens]`."""
    next_draft_probs: TensorValue | None = None
    """float32 `[B, num_speculative_tokens, V]`, for sampled drafts."""

    def values(self) -> tuple[TensorValue, ...]:
        """The graph's outputs in order."""
        required = (self.num_accepted_draft_tokens, self.next_tokens, self.next_draft_tokens)
        return required if self.next_draft_probs is None else (*required, self.next_draft_probs)


@dataclass(frozen=True)
class StepSignature:
    """Input types of a unified graph, and the way back from its inputs to `StepInputs`."""

    device: DeviceRef
    """Where the graph runs."""
    vocab_size: int
    """V, the target's."""
    kv_params: KVCacheParamInterface
    """The target's cache, or a tree with the children `target` and `draft`."""
    sampled_drafts: bool = False
    """Whether the graph takes the distributions that drafts were sampled from."""
    thinking_phase: bool = False
    """Whether the graph takes which rows are inside a thinking block."""

    def types(self) -> list[TensorType | BufferType]:
        """Graph input types in order."""
        cpu = DeviceRef.CPU()
        types: list[TensorType | BufferType] = [
            TensorType(DType.int64, ["num_tokens"], device=self.device),
            TensorType(DType.uint32, ["num_row_offsets"], device=self.device),
            TensorType(DType.int64, [1], device=cpu),
            TensorType(DType.int64, ["batch", "num_draft_tokens"], device=self.device),
            TensorType(DType.int64, ["batch"], device=self.device),
            TensorType(DType.int64, [], device=cpu),
            *tree.leaves(self.kv_params.get_symbolic_inputs()),
            *SamplingInputs.types(self.device, self.vocab_size),
        ]
        if self.sampled_drafts:
            shape: list[DimLike] = ["batch", "num_draft_tokens", self.vocab_size]
            types.append(TensorType(DType.float32, shape, device=self.device))
        if self.thinking_phase:
            types.append(TensorType(DType.bool, ["batch"], device=self.device))
        return types

    def take(self, inputs: Sequence[Value[Any]]) -> StepInputs:
        """Reads the graph inputs that `types` declares.

        Args:
            inputs: the graph's inputs, in the order of `types`.
        """
        rest = iter(inputs)
        # Keyword arguments are evaluated in order, which is the order of `types`.
        return StepInputs(
            tokens=next(rest).tensor,
            row_offsets=next(rest).tensor,
            return_n_logits=next(rest).tensor,
            draft_tokens=next(rest).tensor,
            known_next_tokens=next(rest).tensor,
            num_speculative_tokens=next(rest).tensor,
            caches=take_caches(self.kv_params, rest),
            sampling=SamplingInputs.take(rest),
            draft_probs=next(rest).tensor if self.sampled_drafts else None,
            in_thinking_phase=next(rest).tensor if self.thinking_phase else None,
        )
