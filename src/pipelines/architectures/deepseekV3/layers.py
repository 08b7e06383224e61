"""One DeepSeek-V3 decoder layer, used by the target and by its MTP layer alike."""

from __future__ import annotations

from max.graph import TensorValue, ops
from max.nn import Module, RMSNorm
from max.nn.kv_cache import PagedCacheValues

from ..llama3.linear import GatedMLP
from .attention import AbsorbedLatentAttention
from .config import DeepseekV3Config
from .experts import TiledExperts

__all__ = ["DecoderLayer"]


class DecoderLayer(Module):
    """Attention, then experts or one MLP, each after an RMSNorm and around a residual.

    Args:
        config: the stack this layer is part of.
        experts: whether it has experts.
    """

    def __init__(self, config: DeepseekV3Config, *, experts: bool) -> None:
        super().__init__()
        hidden, dtype, device = config.hidden_size, config.dtype, config.devices[0]
        self.self_attn = AbsorbedLatentAttention(config)
        self.mlp = (
            TiledExperts(config)
            if experts
            else GatedMLP(hidden, config.intermediate_size, dtype, device)
        )
        self.input_layernorm = RMSNorm(hidden, dtype, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(hidden, dtype, config.rms_norm_eps)

    def __call__(
        self,
        layer: TensorValue,
        x: TensorValue,
        cache: PagedCacheValues,
        freqs_cis: TensorValue,
        row_offsets: TensorValue,
    ) -> TensorValue:
        """Runs the layer over ragged rows and writes their cache entries.

        Args:
            layer: uint32 scalar, the layer's index in the cache.
            x: `[T, H]`.
            cache: the stack's cache; row b is written from `cache.cache_lengths[b]` on.
            freqs_cis: `[positions, qk_rope_head_dim]`, the rotary table.
            row_offsets: uint32 `[B + 1]`.

        Returns:
            `[T, H]`.
        """
        normed = self.input_layernorm(x)
        attended = self.self_attn(layer, normed, cache, freqs_cis, row_offsets)
        x = x + ops.rebind(attended, x.shape)
        return x + ops.rebind(self.mlp(self.post_attention_layernorm(x)), x.shape)
