"""The DeepSeek-V3 target: embedding, decoder layers, final norm and head."""

from __future__ import annotations

from collections.abc import Sequence

from max.dtype import DType
from max.graph import TensorValue, ops
from max.nn import LayerList, Module, RMSNorm
from max.nn.kv_cache import PagedCacheValues
from max.nn.transformer.transformer import forward_sequential_layers

from unispec.pipelines.speculative.step import StepInputs
from unispec.pipelines.targets.llama.stack import layer_index

from . import kernels
from .config import DeepseekV3Config
from .layers import DecoderLayer
from .mesh import ALONE, Mesh
from .replicas import mesh_of
from .rope import rotary_embedding

__all__ = ["DeepseekV3", "TargetOfStep"]


class DeepseekV3(Module):
    """A DeepSeek-V3 causal language model without sampling.

    Args:
        config: the stack.
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
        self.alike = [
            [index for index, found in enumerate(kinds) if found is kind]
            for kind in sorted(set(kinds))
        ]
        self.norm = RMSNorm(config.hidden_size, config.dtype, config.rms_norm_eps)
        self.lm_head = kernels.head(config, self.embed_tokens)

    def __call__(
        self,
        tokens: TensorValue,
        row_offsets: TensorValue,
        cache: PagedCacheValues,
        mesh: Mesh = ALONE,
    ) -> tuple[TensorValue, TensorValue]:
        """Runs the stack up to the final norm, whose output the head reads.

        Args:
            tokens: int64 `[T]`, ragged.
            row_offsets: uint32 `[B + 1]`.
            cache: the stack's cache.
            mesh: the devices.

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
            row_offsets: uint32 `[B + 1]`.
            cache: the stack's cache.
            mesh: the devices.

        Returns:
            `[T, H]`, what the head reads, and the draft's features: the same, or
            `[T, n * H]` for n tapped layers.
        """
        outputs: dict[int, TensorValue] = {}
        parts, offsets, caches = mesh.parts(xs, row_offsets, cache)

        def keep(index: int, hidden: list[TensorValue]) -> None:
            if index in self.tapped_layers:
                outputs[index] = mesh.whole(hidden, xs[0])

        freqs_cis = [self.rope.freqs_cis.to(device) for device in self.devices]
        first = self.layers[0]
        assert isinstance(first, DecoderLayer)
        plans = kernels.prefill_plans(first.attention, offsets, caches, mesh.context_lengths)
        # Read first: layers that share a subgraph lose the beginnings of their names.
        prefixes = [self._prefix(index) for index in range(len(self.layers))]
        # One subgraph for the dense layers and one for those with experts.
        hidden = forward_sequential_layers(
            list(self.layers),
            inputs_for_layer=lambda index, xs: [
                layer_index(index),
                xs,
                caches,
                freqs_cis,
                offsets,
                plans,
                mesh.layer_inputs,
            ],
            initial_hidden_states=parts,
            on_layer_output=keep,
            subgraph_layer_groups=self.alike,
            name_for_subgraph=lambda group: f"{prefixes[0]}deepseekV3_{group}",
            weight_prefix_for_layer=prefixes.__getitem__,
        )
        normed = self.norm(mesh.whole(hidden, xs[0]))
        if not self.tapped_layers:
            return normed, normed
        return normed, ops.concat([outputs[index] for index in self.tapped_layers], axis=-1)

    def logits(self, hidden: TensorValue, mesh: Mesh = ALONE) -> TensorValue:
        """float32 `[R, V]` for hidden states `[R, H]`.

        Args:
            hidden: what the head reads.
            mesh: the devices.
        """
        return mesh.project(self.lm_head, hidden).cast(DType.float32)

    def _prefix(self, layer: int) -> str:
        """What the names of a layer's weights begin with, once they are loaded."""
        decoder = self.layers[layer]
        assert isinstance(decoder, DecoderLayer)
        return decoder.input_layernorm.weight.name.removesuffix("input_layernorm.weight")


class TargetOfStep:
    """A stack on the devices of one step.

    Args:
        stack: the target.
        step: the step's inputs.
    """

    def __init__(self, stack: DeepseekV3, step: StepInputs) -> None:
        self._stack = stack
        self._mesh = mesh_of(step, 0)

    def __call__(
        self, tokens: TensorValue, row_offsets: TensorValue, cache: PagedCacheValues
    ) -> tuple[TensorValue, TensorValue]:
        """As `DeepseekV3`; what goes in and what comes out is on the first device."""
        return self._stack(tokens, row_offsets, cache, self._mesh)

    def logits(self, hidden: TensorValue) -> TensorValue:
        """float32 `[R, V]` for hidden states `[R, H]`."""
        return self._stack.logits(hidden, self._mesh)
