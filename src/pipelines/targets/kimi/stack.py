"""The language model, whose tokens may be stood in for by features of images."""

from __future__ import annotations

from dataclasses import dataclass

from max.graph import TensorValue, ops
from max.nn.kv_cache import PagedCacheValues

from unispec.pipelines.speculative.step import StepInputs
from unispec.pipelines.speculative.verify import Target
from unispec.pipelines.targets.deepseek.mesh import Mesh
from unispec.pipelines.targets.deepseek.replicas import mesh_of
from unispec.pipelines.targets.deepseek.stack import DeepseekV3

__all__ = ["KimiK2_5"]


class KimiK2_5(DeepseekV3):
    """A DeepSeek-V3 stack whose steps have features of images."""

    def at(self, step: StepInputs) -> Target:
        """The target in one step, whose `extra` has the features and their indices."""
        (features,) = step.extra["language_image_embeddings"]
        (indices,) = step.extra["language_image_token_indices"]
        return _StackOfStep(self, mesh_of(step, 0), features.tensor, indices.tensor)


@dataclass(frozen=True)
class _StackOfStep:
    """The stack with features in place of the placeholders' embeddings."""

    stack: KimiK2_5
    mesh: Mesh
    features: TensorValue
    """float32 `[n, H]`."""
    indices: TensorValue
    """int64 `[n]`: where they stand among the merged tokens."""

    def __call__(
        self, tokens: TensorValue, row_offsets: TensorValue, cache: PagedCacheValues
    ) -> tuple[TensorValue, TensorValue]:
        embedded = self.mesh.embed(self.stack.embed_tokens, tokens)
        return self.stack.run(
            [self._with_features(x) for x in embedded], row_offsets, cache, self.mesh
        )

    def logits(self, hidden: TensorValue) -> TensorValue:
        return self.stack.logits(hidden, self.mesh)

    def _with_features(self, embedded: TensorValue) -> TensorValue:
        features = self.features.cast(embedded.dtype).to(embedded.device)
        places = ops.unsqueeze(self.indices, 1).to(embedded.device)
        return ops.rebind(ops.scatter_nd(embedded, features, places), embedded.shape)
