"""One Llama decoder layer, used by targets and drafts alike."""

from __future__ import annotations

from max.graph import TensorValue, ops
from max.nn import AttentionWithRope, Linear, Module, RMSNorm
from max.nn.kv_cache import PagedCacheValues
from max.nn.rotary_embedding import RotaryEmbedding

from unispec.pipelines.layers.linear import GatedMLP

from .stack_config import StackConfig

__all__ = ["DecoderLayer", "llama_attention"]


def llama_attention(
    config: StackConfig, rope: RotaryEmbedding, *, input_size: int | None = None
) -> AttentionWithRope:
    """Attention of one layer.

    Args:
        input_size: columns of what queries, keys and values read; None: the stack's hidden size.
    """
    attention = AttentionWithRope(
        hidden_size=input_size or config.hidden_size,
        num_attention_heads=config.num_attention_heads,
        num_key_value_heads=config.num_key_value_heads,
        rope=rope,
        scale=config.attention_multiplier,
        has_bias=config.attention_bias or config.qkv_bias,
        use_qk_norm=config.qk_norm,
        rms_norm_eps=config.norm_eps,
        kv_params=config.kv_params,
        dtype=config.dtype,
        devices=config.devices,
    )
    # Hugging Face's Llama has a bias here too, MAX's layer does not.
    attention.o_proj = Linear(
        config.num_attention_heads * config.head_dim,
        config.hidden_size,
        config.dtype,
        config.devices[0],
        has_bias=config.attention_bias,
    )
    return attention


class DecoderLayer(Module):
    """Attention and MLP, each after an RMSNorm and around a residual.

    Args:
        input_norm: an EAGLE draft's first layer has no norm before its attention.
    """

    def __init__(
        self, config: StackConfig, rope: RotaryEmbedding, *, input_norm: bool = True
    ) -> None:
        super().__init__()
        self.self_attn = llama_attention(config, rope)
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
        normed = self.input_layernorm(x) if self.has_input_norm else x
        attended = self.self_attn(layer, normed, cache, freqs_cis, row_offsets)
        x = x + self._scaled(ops.rebind(attended, x.shape))
        return x + self._scaled(self.mlp(self.post_attention_layernorm(x)))

    def _scaled(self, branch: TensorValue) -> TensorValue:
        return branch if self.residual_multiplier == 1 else branch * self.residual_multiplier
