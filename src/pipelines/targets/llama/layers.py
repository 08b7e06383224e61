"""One Llama decoder layer, used by targets and drafts alike."""

from __future__ import annotations

from max.graph import TensorValue
from max.nn import Module, RMSNorm
from max.nn.kv_cache import PagedCacheValues
from max.nn.rotary_embedding import RotaryEmbedding

from unispec.kernels.operations import decoder_layer
from unispec.pipelines.layers.linear import GatedMLP

from .attention import Attention
from .stack_config import StackConfig

__all__ = ["DecoderLayer"]


class DecoderLayer(Module):
    """Attention and MLP, each after an RMSNorm and around a residual.

    Args:
        input_norm: an EAGLE draft's first layer has no norm before its attention.
    """

    def __init__(
        self, config: StackConfig, rope: RotaryEmbedding, *, input_norm: bool = True
    ) -> None:
        super().__init__()
        self.self_attn = Attention(config, rope)
        self.mlp = GatedMLP(
            config.hidden_size, config.intermediate_size, config.dtype, config.devices[0]
        )
        self.has_input_norm = input_norm
        if input_norm:
            self.input_layernorm = RMSNorm(config.hidden_size, config.dtype, config.norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.dtype, config.norm_eps)
        self.residual_multiplier = config.residual_multiplier

    def __call__(
        self,
        layer: TensorValue,
        x: TensorValue,
        cache: PagedCacheValues,
        freqs_cis: TensorValue,
        row_offsets: TensorValue,
    ) -> TensorValue:
        """Runs the layer over ragged rows and writes their keys and values."""
        norm = self.input_layernorm if self.has_input_norm else None
        factor = self.residual_multiplier
        given = (x, layer, x, cache, freqs_cis, row_offsets)
        first = self.self_attn.half(*given, norm=norm, factor=factor)
        second = self.mlp.half(self.post_attention_layernorm, factor)
        if first is not None and second is not None:
            return decoder_layer(first, second)
        x = self.self_attn(*given, norm=norm, factor=factor)
        return self.mlp.added(x, self.post_attention_layernorm, factor)
