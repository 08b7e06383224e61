"""The language model, whose tokens may be stood in for by features of images."""

from __future__ import annotations

from dataclasses import dataclass

from max.graph import TensorValue, ops
from max.nn.kv_cache import PagedCacheValues

from unispec.pipelines.speculative.step import StepInputs
from unispec.pipelines.speculative.verify import Target
from unispec.pipelines.targets.deepseek.mesh import ALONE
from unispec.pipelines.targets.deepseek.stack import DeepseekV3

__all__ = ["KimiK2_5"]


class KimiK2_5(DeepseekV3):
    """A DeepSeek-V3 stack whose steps have features of images."""

    def at(self, step: StepInputs) -> Target:
        """The target in one step, whose `extra` has the features and their indices."""
        (features,) = step.extra["language_image_embeddings"]
        (indices,) = step.extra["language_image_token_indices"]
        return _StackOfStep(self, features.tensor, indices.tensor)


@dataclass(frozen=True)
class _StackOfStep:
    """The stack with features in place of the placeholders' embeddings."""

    stack: KimiK2_5
    features: TensorValue
    indices: TensorValue
    """int64 `[n]`: where they stand among the merged tokens."""

    def __call__(
        self, tokens: TensorValue, row_offsets: TensorValue, cache: PagedCacheValues
    ) -> tuple[TensorValue, TensorValue]:
        (embedded,) = ALONE.embed(self.stack.embed_tokens, tokens)
        seen = ops.scatter_nd(embedded, self.features, ops.unsqueeze(self.indices, 1))
        return self.stack.run([ops.rebind(seen, embedded.shape)], row_offsets, cache)

    def logits(self, hidden: TensorValue) -> TensorValue:
        return self.stack.logits(hidden)
