"""The language model as a target whose tokens may be stood in for by features of images."""

from __future__ import annotations

from max.graph import TensorValue, ops
from max.nn.kv_cache import PagedCacheValues

from unispec.pipelines.speculative.step import StepInputs
from unispec.pipelines.targets.deepseek.mesh import ALONE
from unispec.pipelines.targets.deepseek.stack import DeepseekV3

__all__ = ["SeeingTarget"]


class SeeingTarget:
    """A DeepSeek-V3 stack in one step of a batch with images.

    Args:
        stack: the language model.
        step: its `more` has the features and where they stand among the merged tokens.
    """

    def __init__(self, stack: DeepseekV3, step: StepInputs) -> None:
        self._stack = stack
        (features,) = step.more["language_image_embeddings"]
        (places,) = step.more["language_image_token_indices"]
        self._features, self._places = features.tensor, places.tensor

    def __call__(
        self, tokens: TensorValue, row_offsets: TensorValue, cache: PagedCacheValues
    ) -> tuple[TensorValue, TensorValue]:
        """As `DeepseekV3`, with features in place of the placeholders' embeddings."""
        (embedded,) = ALONE.embed(self._stack.embed_tokens, tokens)
        seen = ops.scatter_nd(embedded, self._features, ops.unsqueeze(self._places, 1))
        return self._stack.run([ops.rebind(seen, embedded.shape)], row_offsets, cache)

    def logits(self, hidden: TensorValue) -> TensorValue:
        """float32 `[R, V]` for hidden states `[R, H]`."""
        return self._stack.logits(hidden)
