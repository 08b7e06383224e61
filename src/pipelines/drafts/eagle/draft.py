"""The EAGLE draft: a projection over token and feature, then Llama layers.

Format and forward pass as in the EAGLE reference (SafeAILab/EAGLE, EAGLE-1 and
EAGLE-2): row i reads the embedding of token i + 1 and the target's feature of
position i after its final norm; the first layer has no norm before attention,
the stack has no final norm, embedding and head are the target's.
"""

from __future__ import annotations

from typing import Any

from max.graph import TensorValue
from max.nn import LayerList
from max.nn.kv_cache import PagedCacheValues

from unispec.pipelines.drafts.vocabulary import TargetVocabularyDraft
from unispec.pipelines.layers.linear import Linear, paired
from unispec.pipelines.layers.stack import layer_index
from unispec.pipelines.targets.llama.layers import DecoderLayer
from unispec.pipelines.targets.llama.stack import llama_rope

from .config import UnifiedEagleConfig

__all__ = ["EagleDraft"]


class EagleDraft(TargetVocabularyDraft):
    """An EAGLE draft for a target.

    Args:
        config: both stacks, and whether the checkpoint has `fc.bias`.
        target: the target's stack.
    """

    def __init__(self, config: UnifiedEagleConfig, target: Any) -> None:
        super().__init__(config, target)
        stack = config.draft
        size, device = stack.hidden_size, stack.devices[0]
        self.hidden_size = size
        self.rope = llama_rope(stack)
        self.fc = Linear(2 * size, size, stack.dtype, device, has_bias=config.fc_bias)
        self.layers = LayerList(
            [
                DecoderLayer(stack, self.rope, input_norm=index > 0)
                for index in range(stack.num_hidden_layers)
            ]
        )

    def from_target(self, features: TensorValue) -> TensorValue:
        """The same features: those of the final norm are what the draft reads."""
        return features

    def joined(self, tokens: TensorValue, features: TensorValue) -> TensorValue:
        """What the first layer reads, `[T, H]`."""
        return self.fc(paired(tokens, self.embed_tokens, None, features, None))

    def read(
        self,
        tokens: TensorValue,
        features: TensorValue,
        row_offsets: TensorValue,
        cache: PagedCacheValues,
    ) -> None:
        """Writes the keys and values that a call would, which the last layer is not run for."""
        *earlier, last = self.layers
        x = self._through(len(earlier), self.joined(tokens, features), row_offsets, cache)
        last.read(layer_index(len(earlier)), x, cache, self.rope.freqs_cis, row_offsets)

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
        x = self.joined(tokens, features)
        return self._through(len(self.layers), x, row_offsets, cache)

    def _through(
        self, count: int, x: TensorValue, row_offsets: TensorValue, cache: PagedCacheValues
    ) -> TensorValue:
        """`[T, H]` after the first so many layers."""
        for index, layer in enumerate([*self.layers][:count]):
            x = layer(layer_index(index), x, cache, self.rope.freqs_cis, row_offsets)
        return x
