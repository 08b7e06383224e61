"""A draft's way in and out of the target's vocabulary."""

from __future__ import annotations

from typing import Any

from max.dtype import DType
from max.graph import TensorValue, Weight, ops
from max.nn import Module
from max.nn.rotary_embedding import RotaryEmbedding
from typing_extensions import Self

from unispec.pipelines.layers.linear import Embedding, Linear
from unispec.pipelines.speculative.step import StepInputs

from .config import UnifiedDraftConfig

__all__ = ["TargetVocabularyDraft"]


class TargetVocabularyDraft(Module):
    """Base of drafts that embed with the target's embedding and propose the target's tokens.

    A subclass makes `rope`.

    Args:
        config: both stacks; the draft's `vocab_size` N counts the tokens it can propose.
        target: the target's stack, which lends its embedding and head; with a reduced
            vocabulary the draft has a head of those rows only.
    """

    rope: RotaryEmbedding
    """The rotary table of its layers."""

    def __init__(self, config: UnifiedDraftConfig, target: Any) -> None:
        super().__init__()
        stack, vocab_size = config.draft, config.target.vocab_size
        device = stack.devices[0]
        self.embed_tokens: Embedding = target.embed_tokens
        self.lm_head: Linear = target.lm_head
        self.logits_scaling = stack.logits_scaling
        self.reduced = stack.vocab_size < vocab_size
        if self.reduced:
            self.lm_head = Linear(stack.hidden_size, stack.vocab_size, stack.dtype, device)
            self.d2t = Weight("d2t", DType.int64, [stack.vocab_size], device)
            self.t2d = Weight("t2d", DType.int64, [vocab_size], device)

    def at(self, step: StepInputs) -> Self:
        """The draft in one step: on one device the module itself, its rotary table made.

        A table that is made inside a loop could not be read outside of it.
        """
        assert self.rope.freqs_cis is not None
        return self

    def logits(self, features: TensorValue) -> TensorValue:
        """float32 `[..., N]` over the draft's vocabulary for features `[..., H]`."""
        logits = self.lm_head(features).cast(DType.float32)
        return logits if self.logits_scaling == 1 else logits / self.logits_scaling

    def target_ids(self, draft_ids: TensorValue) -> TensorValue:
        """Target ids of draft ids, any shape: id + d2t[id] (EAGLE-3's convention)."""
        if not self.reduced:
            return draft_ids
        return draft_ids + ops.gather(self.d2t, draft_ids, axis=0)

    def target_probs(self, probs: TensorValue) -> TensorValue:
        """Spreads float32 `[..., N]` over the target's vocabulary; other tokens get 0."""
        if not self.reduced:
            return probs
        nothing = ops.constant(0.0, DType.float32, device=probs.device)
        padding = ops.broadcast_to(nothing, [*probs.shape[:-1], 1])
        return ops.gather(ops.concat([probs, padding], axis=-1), self.t2d, axis=-1)
