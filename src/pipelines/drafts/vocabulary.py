"""A draft's way in and out of the target's vocabulary."""

from __future__ import annotations

from max.dtype import DType
from max.graph import TensorValue, Weight, ops
from max.nn import Embedding, Linear, Module

from unispec.pipelines.targets.llama.config import Llama3Config

__all__ = ["TargetVocabularyDraft", "draft_head"]


class TargetVocabularyDraft(Module):
    """Base of drafts that embed with the target's embedding and propose the target's tokens.

    Args:
        config: the draft's own stack; its `vocab_size` N counts the tokens it can propose.
        embed_tokens: the target's embedding.
        lm_head: the target's head; with a reduced vocabulary, a head of those rows only.
        target_vocab_size: V, the target's vocabulary.
    """

    def __init__(
        self,
        config: Llama3Config,
        *,
        embed_tokens: Embedding,
        lm_head: Linear,
        target_vocab_size: int,
    ) -> None:
        super().__init__()
        device = config.devices[0]
        self.embed_tokens = embed_tokens
        self.lm_head = lm_head
        self.reduced = config.vocab_size < target_vocab_size
        if self.reduced:
            self.d2t = Weight("d2t", DType.int64, [config.vocab_size], device)
            self.t2d = Weight("t2d", DType.int64, [target_vocab_size], device)

    def logits(self, features: TensorValue) -> TensorValue:
        """float32 `[..., N]` over the draft's vocabulary for features `[..., H]`."""
        return self.lm_head(features).cast(DType.float32)

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


def draft_head(config: Llama3Config, target_head: Linear, target_vocab_size: int) -> Linear:
    """The target's own head, or for a reduced vocabulary one of `config.vocab_size` rows.

    Args:
        config: the draft's stack.
        target_head: the target's head.
        target_vocab_size: V.
    """
    if config.vocab_size == target_vocab_size:
        return target_head
    return Linear(config.hidden_size, config.vocab_size, config.dtype, config.devices[0])
