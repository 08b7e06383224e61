"""The DeepSeek-V3 target: embedding, decoder layers, final norm and head."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from max.dtype import DType
from max.graph import TensorValue
from max.nn import LayerList, Module, RMSNorm
from max.nn.kv_cache import PagedCacheValues

from unispec.pipelines.layers.stack import (
    LayerGroup,
    layer_index,
    run_layers,
    weight_prefix,
    with_features,
)
from unispec.pipelines.speculative.step import StepInputs
from unispec.pipelines.speculative.verify import Target

from . import kernels
from .config import DeepseekV3Config
from .layers import DecoderLayer
from .mesh import ALONE, Mesh
from .replicas import mesh_of
from .rope import rotary_embedding

__all__ = ["DeepseekV3"]


class DeepseekV3(Module):
    """A DeepSeek-V3 causal language model without sampling.

    Args:
        tapped_layers: layers whose outputs are the draft's features, in this order; by
            default a draft reads what the head reads.
    """

    def __init__(self, config: DeepseekV3Config, *, tapped_layers: Sequence[int] = ()) -> None:
        super().__init__()
        self.tapped_layers = tuple(tapped_layers)
        self.devices = config.devices
        self.rope = rotary_embedding(config)
        self.embed_tokens = kernels.embedding(config)
        kinds = [config.has_experts(index) for index in range(config.num_hidden_layers)]
        self.layers = LayerList([DecoderLayer(config, experts=kind) for kind in kinds])
        self.same_kind = [
            [index for index, found in enumerate(kinds) if found is kind]
            for kind in sorted(set(kinds))
        ]
        self.norm = RMSNorm(config.hidden_size, config.dtype, config.rms_norm_eps)
        self.lm_head = kernels.head(config, self.embed_tokens)

    def at(self, step: StepInputs) -> Target:
        """The target on the devices of one step."""
        return _StackOfStep(self, mesh_of(step, 0))

    def __call__(
        self,
        tokens: TensorValue,
        row_offsets: TensorValue,
        cache: PagedCacheValues,
        mesh: Mesh = ALONE,
    ) -> tuple[TensorValue, TensorValue]:
        """Runs the stack up to the final norm, whose output the head reads.

        Returns:
            As `run`.
        """
        return self.run(mesh.embed(self.embed_tokens, tokens), row_offsets, cache, mesh)

    def run(
        self,
        xs: Sequence[TensorValue],
        row_offsets: TensorValue,
        cache: PagedCacheValues,
        mesh: Mesh = ALONE,
    ) -> tuple[TensorValue, TensorValue]:
        """Runs the layers over embedded tokens.

        Args:
            xs: `[T, H]`, ragged, on every device or on the first one.

        Returns:
            `[T, H]`, what the head reads, and the draft's features: the same, or
            `[T, n * H]` for n tapped layers.
        """
        scattered, offsets, caches = mesh.scatter(xs, row_offsets, cache)
        freqs_cis = [self.rope.freqs_cis.to(device) for device in self.devices]
        first = self.layers[0]
        assert isinstance(first, DecoderLayer)
        plans = kernels.prefill_plans(first.attention, offsets, caches, mesh.context_lengths)
        prefix = weight_prefix(first)

        def inputs(index: int, xs: list[TensorValue]) -> list[Any]:
            layer = layer_index(index)
            return [layer, xs, caches, freqs_cis, offsets, plans, mesh.communication]

        hidden, tapped = run_layers(
            list(self.layers),
            scattered,
            inputs,
            # One subgraph for the dense layers and one for those with experts.
            groups=[
                LayerGroup(f"{prefix}deepseekV3_{index}", layers)
                for index, layers in enumerate(self.same_kind)
            ],
            tapped_layers=self.tapped_layers,
        )
        normed = self.norm(mesh.gather(hidden, xs[0]))
        return with_features(normed, [mesh.gather(output, xs[0]) for output in tapped])

    def logits(self, hidden: TensorValue, mesh: Mesh = ALONE) -> TensorValue:
        """float32 `[R, V]` for hidden states `[R, H]`."""
        return mesh.project(self.lm_head, hidden).cast(DType.float32)


@dataclass(frozen=True)
class _StackOfStep:
    """A stack on the devices of one step; what goes in and out is on the first."""

    stack: DeepseekV3
    mesh: Mesh

    def __call__(
        self, tokens: TensorValue, row_offsets: TensorValue, cache: PagedCacheValues
    ) -> tuple[TensorValue, TensorValue]:
        return self.stack(tokens, row_offsets, cache, self.mesh)

    def logits(self, hidden: TensorValue) -> TensorValue:
        return self.stack.logits(hidden, self.mesh)
