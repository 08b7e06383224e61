"""The Llama target: embedding, decoder layers, final norm and head."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from max.dtype import DType
from max.graph import TensorValue
from max.nn import LayerList, Module, RMSNorm
from max.nn.kv_cache import PagedCacheValues
from max.nn.rotary_embedding import RotaryEmbedding
from typing_extensions import Self

from unispec.pipelines.layers.linear import Embedding, Linear
from unispec.pipelines.layers.rope import rotary_embedding
from unispec.pipelines.layers.stack import LayerGroup, layer_index, run_layers, with_features
from unispec.pipelines.speculative.step import StepInputs

from .config import Llama3Config
from .layers import DecoderLayer
from .stack_config import StackConfig

__all__ = ["Llama3", "llama_rope"]


class Llama3(Module):
    """A Llama causal language model without sampling.

    Args:
        tapped_layers: layers whose outputs are the draft's features, in this order; by
            default a draft reads what the head reads.
    """

    def __init__(self, config: StackConfig, *, tapped_layers: Sequence[int] = ()) -> None:
        super().__init__()
        self.tapped_layers = tuple(tapped_layers)
        device = config.devices[0]
        self.rope = llama_rope(config)
        self.embed_tokens = Embedding(config.vocab_size, config.hidden_size, config.dtype, device)
        self.layers = LayerList(
            [DecoderLayer(config, self.rope) for _ in range(config.num_hidden_layers)]
        )
        self.norm = RMSNorm(config.hidden_size, config.dtype, config.norm_eps)
        self.lm_head = Linear(config.hidden_size, config.vocab_size, config.dtype, device)
        if config.tie_word_embeddings:
            self.lm_head.tie(self.embed_tokens)
        self.embedding_multiplier = config.embedding_multiplier
        self.logits_scaling = config.logits_scaling

    def at(self, step: StepInputs) -> Self:
        """The target in one step: on one device the stack itself."""
        return self

    def __call__(
        self, tokens: TensorValue, row_offsets: TensorValue, cache: PagedCacheValues
    ) -> tuple[TensorValue, TensorValue]:
        """Runs the stack up to the final norm, whose output the head reads.

        Returns:
            `[T, H]`, what the head reads, and the draft's features: the same, or
            `[T, n * H]` for n tapped layers.
        """
        freqs_cis = self.rope.freqs_cis
        x = self.embed_tokens(tokens)
        if self.embedding_multiplier != 1:
            x = x * self.embedding_multiplier

        def inputs(index: int, hidden: list[TensorValue]) -> list[Any]:
            return [layer_index(index), hidden[0], cache, freqs_cis, row_offsets]

        (x,), tapped = run_layers(
            list(self.layers),
            [x],
            inputs,
            # One subgraph for all layers: the compiler sees a layer once, not thirty times.
            groups=[LayerGroup("llama3_layer", list(range(len(self.layers))))],
            tapped_layers=self.tapped_layers,
        )
        return with_features(self.norm(x), [hidden for (hidden,) in tapped])

    def logits(self, hidden: TensorValue) -> TensorValue:
        """float32 `[R, V]` for hidden states `[R, H]`."""
        logits = self.lm_head(hidden).cast(DType.float32)
        return logits if self.logits_scaling == 1 else logits / self.logits_scaling


def llama_rope(config: Llama3Config) -> RotaryEmbedding:
    """The rotary table of a stack."""
    return rotary_embedding(
        config.rope,
        head_dim=config.head_dim,
        max_seq_len=config.max_seq_len,
        interleaved=config.interleaved_rope_weights,
    )
