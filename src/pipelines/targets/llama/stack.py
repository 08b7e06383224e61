"""The Llama target: embedding, decoder layers, final norm and head."""

from __future__ import annotations

from collections.abc import Sequence

from max.dtype import DType
from max.graph import DeviceRef, TensorValue, ops
from max.nn import Embedding, LayerList, Linear, Module, RMSNorm
from max.nn.kv_cache import PagedCacheValues
from max.nn.transformer.transformer import forward_sequential_layers

from unispec.pipelines.layers.rope import rotary_embedding

from .config import Llama3Config
from .layers import DecoderLayer

__all__ = ["Llama3", "layer_index"]


class Llama3(Module):
    """A Llama causal language model without sampling.

    Args:
        config: the stack.
        tapped_layers: layers whose outputs are the draft's features, in this order; by
            default a draft reads what the head reads.
    """

    def __init__(self, config: Llama3Config, *, tapped_layers: Sequence[int] = ()) -> None:
        super().__init__()
        self.tapped_layers = tuple(tapped_layers)
        device = config.devices[0]
        self.rope = rotary_embedding(config)
        self.embed_tokens = Embedding(config.vocab_size, config.hidden_size, config.dtype, device)
        self.layers = LayerList(
            [DecoderLayer(config, self.rope) for _ in range(config.num_hidden_layers)]
        )
        self.norm = RMSNorm(config.hidden_size, config.dtype, config.norm_eps)
        self.lm_head = Linear(config.hidden_size, config.vocab_size, config.dtype, device)
        if config.tie_word_embeddings:
            self.lm_head.set_shared_weight("weight", self.embed_tokens.weight)

    def __call__(
        self, tokens: TensorValue, row_offsets: TensorValue, cache: PagedCacheValues
    ) -> tuple[TensorValue, TensorValue]:
        """Runs the stack up to the final norm, whose output the head reads.

        Args:
            tokens: int64 `[T]`, ragged.
            row_offsets: uint32 `[B + 1]`.
            cache: the stack's cache.

        Returns:
            `[T, H]`, what the head reads, and the draft's features: the same, or
            `[T, n * H]` for n tapped layers.
        """
        outputs: dict[int, TensorValue] = {}

        def keep(index: int, hidden: list[TensorValue]) -> None:
            if index in self.tapped_layers:
                outputs[index] = hidden[0]

        freqs_cis = self.rope.freqs_cis
        # One subgraph for all layers: the compiler sees a layer once, not thirty times.
        (x,) = forward_sequential_layers(
            list(self.layers),
            inputs_for_layer=lambda index, x: [
                layer_index(index),
                x[0],
                cache,
                freqs_cis,
                row_offsets,
            ],
            initial_hidden_states=[self.embed_tokens(tokens)],
            on_layer_output=keep,
            subgraph_layer_groups=[list(range(len(self.layers)))],
            name_for_subgraph=lambda _: "llama3_layer",
            weight_prefix_for_layer=lambda index: f"target.layers.{index}.",
        )
        hidden = self.norm(x)
        if not self.tapped_layers:
            return hidden, hidden
        return hidden, ops.concat([outputs[index] for index in self.tapped_layers], axis=-1)

    def logits(self, hidden: TensorValue) -> TensorValue:
        """float32 `[R, V]` for hidden states `[R, H]`."""
        return self.lm_head(hidden).cast(DType.float32)


def layer_index(index: int) -> TensorValue:
    """The uint32 scalar that cache kernels take as a layer's index."""
    return ops.constant(index, DType.uint32, device=DeviceRef.CPU())
