"""The EAGLE draft: a projection over token and feature, then Llama layers.

Format and forward pass as in the EAGLE reference (SafeAILab/EAGLE, EAGLE-1 and
EAGLE-2): row i reads the embedding of token i + 1 and the target's feature of
position i after its final norm; the first layer has no norm before attention,
the stack has no final norm, embedding and head are the target's.
"""

from __future__ import annotations

from max.dtype import DType
from max.graph import TensorValue, Weight, ops
from max.nn import Embedding, LayerList, Linear, Module
from max.nn.kv_cache import PagedCacheValues

from ..llama3.config import Llama3Config
from ..llama3.layers import DecoderLayer
from ..llama3.stack import layer_index, rotary_embedding

__all__ = ["EagleDraft"]


class EagleDraft(Module):
    """An EAGLE draft for a Llama target.

    Args:
        config: the draft's own stack.
        embed_tokens: the target's embedding.
        lm_head: the target's head; with a reduced vocabulary, a head of those rows only.
        fc_bias: whether the checkpoint has `fc.bias`.
        target_vocab_size: V, the target's vocabulary.
    """

    def __init__(
        self,
        config: Llama3Config,
        *,
        embed_tokens: Embedding,
        lm_head: Linear,
        fc_bias: bool,
        target_vocab_size: int,
    ) -> None:
        super().__init__()
        device = config.devices[0]
        self.rope = rotary_embedding(config)
        self.embed_tokens = embed_tokens
        self.lm_head = lm_head
        self.fc = Linear(
            2 * config.hidden_size, config.hidden_size, config.dtype, device, has_bias=fc_bias
        )
        self.layers = LayerList(
            [
                DecoderLayer(config, self.rope, input_norm=index > 0)
                for index in range(config.num_hidden_layers)
            ]
        )
        self.reduced = config.vocab_size < target_vocab_size
        if self.reduced:
            self.d2t = Weight("d2t", DType.int64, [config.vocab_size], device)
            self.t2d = Weight("t2d", DType.int64, [target_vocab_size], device)

    def __call__(
        self,
        tokens: TensorValue,
        features: TensorValue,
        row_offsets: TensorValue,
        cache: PagedCacheValues,
    ) -> TensorValue:
        """Runs the draft over ragged rows; `[T, H]`, features for the rows that follow.

        Args:
            tokens: int64 `[T]`, the token after each position.
            features: `[T, H]`, the feature of each position.
            row_offsets: uint32 `[B + 1]`.
            cache: the draft's cache.
        """
        embedded = ops.rebind(self.embed_tokens(tokens), features.shape)
        x = self.fc(ops.concat([embedded, features], axis=-1))
        freqs_cis = self.rope.freqs_cis
        for index, layer in enumerate(self.layers):
            x = layer(layer_index(index), x, cache, freqs_cis, row_offsets)
        return x

    def logits(self, features: TensorValue) -> TensorValue:
        """float32 `[B, N]` over the draft's vocabulary for features `[B, H]`."""
        return self.lm_head(features).cast(DType.float32)

    def target_ids(self, draft_ids: TensorValue) -> TensorValue:
        """Target token ids `[B]` of draft token ids `[B]`: id + d2t[id] (EAGLE-3's convention)."""
        if not self.reduced:
            return draft_ids
        return draft_ids + ops.gather(self.d2t, draft_ids, axis=0)

    def target_probs(self, probs: TensorValue) -> TensorValue:
        """Spreads float32 `[B, N]` over the target's vocabulary; other tokens get 0."""
        if not self.reduced:
            return probs
        nothing = ops.constant(0.0, DType.float32, device=probs.device)
        padded = ops.concat([probs, ops.broadcast_to(nothing, [probs.shape[0], 1])], axis=1)
        return ops.gather(padded, self.t2d, axis=1)
