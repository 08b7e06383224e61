"""The EAGLE-3 draft as a chain (arXiv 2503.01840).

Row i reads the embedding of token i + 1 and a feature of position i. Of positions that the target
has read, `fc` makes the feature of the tapped layers' outputs; of later ones it is what the draft
itself put out one row before. Forward pass as in SafeAILab/EAGLE (`cnets.py`) and vLLM and SGLang
(`llama_eagle3.py`); the options are those of vllm-project/speculators.
"""

from __future__ import annotations

from typing import Any

from max.dtype import DType
from max.graph import TensorValue, ops
from max.nn import LayerList, RMSNorm
from max.nn.kv_cache import PagedCacheValues
from max.nn.rotary_embedding import RotaryEmbedding

from unispec.pipelines.drafts.vocabulary import TargetVocabularyDraft
from unispec.pipelines.layers.linear import Embedding, Linear, paired
from unispec.pipelines.layers.stack import layer_index
from unispec.pipelines.targets.llama.layers import AttentionAndMLP, DecoderLayer
from unispec.pipelines.targets.llama.stack import llama_rope
from unispec.pipelines.targets.llama.stack_config import StackConfig

from .config import UnifiedEagle3Config

__all__ = ["Eagle3Draft"]


class _FirstLayer(AttentionAndMLP):
    """A Llama layer whose attention reads an embedding beside the feature that it adds to.

    Args:
        norm_before_residual: whether it adds to the normed feature.
    """

    def __init__(
        self, config: StackConfig, rope: RotaryEmbedding, *, norm_before_residual: bool
    ) -> None:
        size, dtype, eps = config.hidden_size, config.dtype, config.norm_eps
        super().__init__(config, rope, input_size=2 * size)
        self.norm_before_residual = norm_before_residual
        self.input_layernorm = RMSNorm(size, dtype, eps)
        self.hidden_norm = RMSNorm(size, dtype, eps)

    def __call__(
        self,
        layer: TensorValue,
        pair: TensorValue,
        feature: TensorValue,
        cache: PagedCacheValues,
        freqs_cis: TensorValue,
        row_offsets: TensorValue,
    ) -> TensorValue:
        """`[T, H]` of features `[T, H]` and their `pair`; writes the rows' keys and values."""
        x = self.hidden_norm(feature) if self.norm_before_residual else feature
        return self.run(x, layer, pair, cache, freqs_cis, row_offsets, norm=None)

    def pair(self, tokens: TensorValue, embedding: Embedding, features: TensorValue) -> TensorValue:
        """What attention reads, `[T, 2H]`: the tokens' embeddings and the features, both normed."""
        return paired(tokens, embedding, self.input_layernorm, features, self.hidden_norm)

    def read(
        self,
        layer: TensorValue,
        pair: TensorValue,
        cache: PagedCacheValues,
        freqs_cis: TensorValue,
        row_offsets: TensorValue,
    ) -> None:
        """Writes the rows' keys and values as a call would, and computes nothing else."""
        self.store(layer, pair, cache, freqs_cis, row_offsets, norm=None)


class Eagle3Draft(TargetVocabularyDraft):
    """An EAGLE-3 draft for a target.

    Args:
        config: both stacks, the tapped layers, and what the checkpoint has of its own.
        target: the target's stack.
    """

    def __init__(self, config: UnifiedEagle3Config, target: Any) -> None:
        super().__init__(config, target)
        stack, taps = config.draft, len(config.target_layer_ids)
        size, dtype, device = stack.hidden_size, stack.dtype, stack.devices[0]
        read = config.target.hidden_size
        if config.own_embedding:
            self.embed_tokens = Embedding(config.target.vocab_size, size, dtype, device)
        if config.own_head:
            self.lm_head = Linear(size, stack.vocab_size, dtype, device)
            self.logits_scaling = 1.0
        self.hidden_size = size
        self.rope = llama_rope(stack)
        self.num_taps = taps
        self.norm_output = config.norm_output
        self.input_norm = (
            RMSNorm(taps * read, dtype, stack.norm_eps) if config.norm_before_fc else None
        )
        self.fc_norm = LayerList(
            [RMSNorm(read, dtype, stack.norm_eps) for _ in range(taps if config.fc_norm else 0)]
        )
        self.fc = Linear(taps * read, size, dtype, device, has_bias=config.fc_bias)
        first = _FirstLayer(stack, self.rope, norm_before_residual=config.norm_before_residual)
        others = [DecoderLayer(stack, self.rope) for _ in range(1, stack.num_hidden_layers)]
        self.layers = LayerList([first, *others])
        self.norm = RMSNorm(size, dtype, stack.norm_eps)

    def from_target(self, features: TensorValue) -> TensorValue:
        """`[U, H]` of the tapped layers' outputs `[U, n * Ht]`, Ht the target's hidden size."""
        if self.input_norm is not None:
            features = self.input_norm(features)
        if len(self.fc_norm):
            features = self._normed_taps(features)
        return self.fc(features)

    def _normed_taps(self, features: TensorValue) -> TensorValue:
        """Each tap after its own norm: all of them by one norm without a weight, then by theirs."""
        device, floats = features.device, DType.float32
        weights = ops.stack([norm.weight.cast(floats).to(device) for norm in self.fc_norm])
        count, size = weights.shape
        taps = features.cast(floats).reshape([features.shape[0], count, size])  # [U, n, Ht]
        ones = ops.broadcast_to(ops.constant(1, floats, device=device), [size])
        normed = ops.rms_norm(taps, ones, self.norm.eps) * weights
        return normed.cast(features.dtype).reshape(features.shape)

    def read(
        self,
        tokens: TensorValue,
        features: TensorValue,
        row_offsets: TensorValue,
        cache: PagedCacheValues,
    ) -> None:
        """Writes the keys and values that a call would, which the last layer is not run for."""
        first, *others = self.layers
        pair, freqs_cis = first.pair(tokens, self.embed_tokens, features), self.rope.freqs_cis
        if not others:
            first.read(layer_index(0), pair, cache, freqs_cis, row_offsets)
            return
        x = self._through(len(others), pair, features, row_offsets, cache)
        others[-1].read(layer_index(len(others)), x, cache, freqs_cis, row_offsets)

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
        """
        first, *others = self.layers
        pair = first.pair(tokens, self.embed_tokens, features)
        x = self._through(1 + len(others), pair, features, row_offsets, cache)
        return self.norm(x) if self.norm_output else x

    def _through(
        self,
        count: int,
        pair: TensorValue,
        features: TensorValue,
        row_offsets: TensorValue,
        cache: PagedCacheValues,
    ) -> TensorValue:
        """`[T, H]` after the first so many layers, of one at least."""
        first, *others = [*self.layers][:count]
        freqs_cis = self.rope.freqs_cis
        x: TensorValue = first(layer_index(0), pair, features, cache, freqs_cis, row_offsets)
        for index, layer in enumerate(others, start=1):
            x = layer(layer_index(index), x, cache, freqs_cis, row_offsets)
        return x

    def logits(self, features: TensorValue) -> TensorValue:
        """float32 `[..., N]` over the draft's vocabulary for features `[..., H]`."""
        return super().logits(features if self.norm_output else self.norm(features))
