"""The MTP layer as a draft: a projection over token and feature, then one decoder layer.

DeepSeek-V3 (arXiv 2412.19437, section 2.2) and its released checkpoint. Row i reads the embedding
of token i + 1 and the target's feature of position i after its final norm. The checkpoint's
`eh_proj` expects the embedding first, though the paper writes it last.
"""

from __future__ import annotations

from typing import Any

from max.dtype import DType
from max.graph import TensorValue, ops
from max.nn import Linear, Module, RMSNorm
from max.nn.kv_cache import PagedCacheValues

from unispec.pipelines.layers.stack import layer_index
from unispec.pipelines.speculative.sequential import SequentialDraft
from unispec.pipelines.speculative.step import StepInputs
from unispec.pipelines.targets.deepseek import kernels
from unispec.pipelines.targets.deepseek.layers import DecoderLayer
from unispec.pipelines.targets.deepseek.mesh import Mesh
from unispec.pipelines.targets.deepseek.replicas import mesh_of
from unispec.pipelines.targets.deepseek.rope import rotary_embedding
from unispec.pipelines.targets.deepseek.stack import DeepseekV3

from .config import UnifiedMtpConfig

__all__ = ["MtpDraft"]


class MtpDraft(Module):
    """The MTP layer of a DeepSeek-V3 checkpoint, used again for every proposal.

    What it hands on to its next row has passed its own norm, as the target's features have
    passed theirs. SGLang and TensorRT-LLM do the same, MAX hands on the state before the norm.

    Args:
        target: the target's module, whose embedding and head it has; the checkpoint's copies are
            the same.
    """

    def __init__(self, config: UnifiedMtpConfig, target: DeepseekV3) -> None:
        super().__init__()
        stack = config.target
        hidden, dtype, eps = stack.hidden_size, stack.dtype, stack.rms_norm_eps
        self.hidden_size = hidden
        self.embed_tokens = target.embed_tokens
        self.lm_head = target.lm_head
        self.devices = stack.devices
        self.rope = rotary_embedding(stack)
        self.enorm = RMSNorm(hidden, dtype, eps)
        self.hnorm = RMSNorm(hidden, dtype, eps)
        self.eh_proj = Linear(2 * hidden, hidden, dtype, stack.devices[0])
        # Numbered after the target's last layer, so it has experts where that one has.
        experts = stack.has_experts(stack.num_hidden_layers)
        self.layer = DecoderLayer(stack.one_layer(), experts=experts)
        self.norm = RMSNorm(hidden, dtype, eps)

    def at(self, step: StepInputs) -> SequentialDraft:
        """The draft on the devices of one step, its rotary table made outside of loops."""
        assert self.rope.freqs_cis is not None
        return _DraftOfStep(self, mesh_of(step, 1))

    def read(
        self,
        tokens: TensorValue,
        features: TensorValue,
        row_offsets: TensorValue,
        cache: PagedCacheValues,
        mesh: Mesh,
    ) -> None:
        """Writes the rows' cache entries as a call would, without the layer's experts."""
        x = self._joined(tokens, features, mesh)
        self.layer.read(layer_index(0), *self._scattered(x, row_offsets, cache, mesh))

    def __call__(
        self,
        tokens: TensorValue,
        features: TensorValue,
        row_offsets: TensorValue,
        cache: PagedCacheValues,
        mesh: Mesh,
    ) -> TensorValue:
        """Runs the draft over ragged rows; `[T, H]`, features for the rows that follow.

        Args:
            tokens: int64 `[T]`, the token after each position.
            features: `[T, H]`, the feature of each position.
        """
        x = self._joined(tokens, features, mesh)
        scattered = self._scattered(x, row_offsets, cache, mesh)
        hidden = self.layer(layer_index(0), *scattered, mesh.communication)
        return self.norm(mesh.gather(hidden, x))

    def _joined(self, tokens: TensorValue, features: TensorValue, mesh: Mesh) -> TensorValue:
        """What the layer reads, `[T, H]`."""
        embedded, *_ = mesh.embed(self.embed_tokens, tokens)
        embedded = ops.rebind(embedded, features.shape)
        return self.eh_proj(ops.concat([self.enorm(embedded), self.hnorm(features)], axis=-1))

    def _scattered(
        self, x: TensorValue, row_offsets: TensorValue, cache: PagedCacheValues, mesh: Mesh
    ) -> tuple[Any, Any, Any, Any, Any]:
        """What the layer is called with on each device: states, caches and how to attend."""
        scattered, offsets, caches = mesh.scatter([x], row_offsets, cache)
        freqs_cis = [self.rope.freqs_cis.to(device) for device in self.devices]
        plans = kernels.prefill_plans(self.layer.attention, offsets, caches, mesh.context_lengths)
        return scattered, caches, freqs_cis, offsets, plans

    def logits(self, features: TensorValue, mesh: Mesh) -> TensorValue:
        """float32 `[..., V]` for features `[..., H]`."""
        return mesh.project(self.lm_head, features).cast(DType.float32)


class _DraftOfStep:
    """The MTP layer on the devices of one step; what goes in and out is on the first."""

    def __init__(self, draft: MtpDraft, mesh: Mesh) -> None:
        self._draft = draft
        self._mesh = mesh
        self.hidden_size = draft.hidden_size

    def from_target(self, features: TensorValue) -> TensorValue:
        """The same features: those of the final norm are what the layer reads."""
        return features

    def read(
        self,
        tokens: TensorValue,
        features: TensorValue,
        row_offsets: TensorValue,
        cache: PagedCacheValues,
    ) -> None:
        self._draft.read(tokens, features, row_offsets, cache, self._mesh)

    def __call__(
        self,
        tokens: TensorValue,
        features: TensorValue,
        row_offsets: TensorValue,
        cache: PagedCacheValues,
    ) -> TensorValue:
        return self._draft(tokens, features, row_offsets, cache, self._mesh)

    def logits(self, features: TensorValue) -> TensorValue:
        return self._draft.logits(features, self._mesh)

    def target_ids(self, draft_ids: TensorValue) -> TensorValue:
        """The same ids: the draft has the target's vocabulary."""
        return draft_ids

    def target_probs(self, probs: TensorValue) -> TensorValue:
        """The same probabilities."""
        return probs
