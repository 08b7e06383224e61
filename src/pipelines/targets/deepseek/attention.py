"""Multi-head latent attention with kernels that every device has.

DeepSeek-V2, arXiv 2405.04434, section 2.1. A token's keys and values of all heads are made from
one latent row. The matrices that make them are moved to the query's and to the output's side
("absorbed"), so that attention reads the cached rows as they are: all heads share one key, and
its first columns are the value.
"""

from __future__ import annotations

from max.graph import TensorValue, Weight, ops
from max.nn import Module, RMSNorm
from max.nn.attention import MHAMaskVariant
from max.nn.kernels import flash_attention_ragged, kv_cache_store_paged_ragged, rope_ragged
from max.nn.kv_cache import PagedCacheValues

from unispec.pipelines.layers.linear import Linear

from .config import LATENT_NORM_EPS, DeepseekV3Config

__all__ = ["AbsorbedLatentAttention"]


class AbsorbedLatentAttention(Module):
    """Latent attention as attention of many query heads to one key head.

    Args:
        config: the stack; R is its `kv_lora_rank`, P its `qk_rope_head_dim`.
    """

    def __init__(self, config: DeepseekV3Config) -> None:
        super().__init__()
        self.config = config
        device, dtype, heads = config.devices[0], config.dtype, config.num_attention_heads
        hidden, rank = config.hidden_size, config.kv_lora_rank

        def linear(width_in: int, width_out: int) -> Linear:
            return Linear(width_in, width_out, dtype, device)

        query_width = heads * config.query_head_dim
        if config.q_lora_rank is None:
            self.q_proj = linear(hidden, query_width)
        else:
            self.q_a_proj = linear(hidden, config.q_lora_rank)
            self.q_a_layernorm = RMSNorm(config.q_lora_rank, dtype, LATENT_NORM_EPS)
            self.q_b_proj = linear(config.q_lora_rank, query_width)
        self.kv_a_proj_with_mqa = linear(hidden, config.cache_width)
        self.kv_a_layernorm = RMSNorm(rank, dtype, LATENT_NORM_EPS)
        self.k_b_proj = Weight("k_b_proj", dtype, [heads, config.qk_nope_head_dim, rank], device)
        self.v_b_proj = Weight("v_b_proj", dtype, [heads, rank, config.v_head_dim], device)
        self.o_proj = linear(heads * config.v_head_dim, hidden)

    def __call__(
        self,
        layer: TensorValue,
        x: TensorValue,
        cache: PagedCacheValues,
        freqs_cis: TensorValue,
        row_offsets: TensorValue,
    ) -> TensorValue:
        """Writes the tokens' rows and attends to all before them."""
        self.store(layer, x, cache, freqs_cis, row_offsets)
        config = self.config
        rank, tokens = config.kv_lora_rank, x.shape[0]
        query = self._query(x).reshape([tokens, -1, config.query_head_dim])
        query, query_rope = ops.split(
            query, [config.qk_nope_head_dim, config.qk_rope_head_dim], axis=-1
        )
        turned = query.permute([1, 0, 2]) @ self.k_b_proj  # [heads, T, R]
        query_rope = self._rotated(query_rope, cache, freqs_cis, row_offsets)
        query = ops.concat([turned.permute([1, 0, 2]), query_rope], axis=-1)
        attended = flash_attention_ragged(
            config.kv_params,
            query,
            row_offsets,
            cache,
            layer,
            MHAMaskVariant.CAUSAL_MASK,
            config.softmax_scale,
        )  # [T, heads, R + P]
        values = attended[:, :, :rank].permute([1, 0, 2]) @ self.v_b_proj  # [heads, T, v_head_dim]
        return self.o_proj(values.permute([1, 0, 2]).reshape([tokens, -1]))

    def store(
        self,
        layer: TensorValue,
        x: TensorValue,
        cache: PagedCacheValues,
        freqs_cis: TensorValue,
        row_offsets: TensorValue,
    ) -> None:
        """Writes the tokens' rows."""
        latent, key_rope = ops.split(
            self.kv_a_proj_with_mqa(x),
            [self.config.kv_lora_rank, self.config.qk_rope_head_dim],
            axis=-1,
        )
        key_rope = self._rotated(ops.unsqueeze(key_rope, 1), cache, freqs_cis, row_offsets)
        latent = ops.unsqueeze(self.kv_a_layernorm(latent), 1)  # [T, 1, R]
        row = ops.concat([latent, key_rope], axis=-1)  # [T, 1, R + P]
        for which in (0, 1):  # the key, and the value that is part of it
            kv_cache_store_paged_ragged(cache, row, row_offsets, layer, key_or_value=which)

    def _rotated(
        self,
        part: TensorValue,
        cache: PagedCacheValues,
        freqs_cis: TensorValue,
        row_offsets: TensorValue,
    ) -> TensorValue:
        """`[T, heads, P]` turned by each token's position."""
        return rope_ragged(
            part,
            row_offsets,
            cache.cache_lengths,
            freqs_cis,
            interleaved=self.config.rope_interleave,
        )

    def _query(self, x: TensorValue) -> TensorValue:
        if self.config.q_lora_rank is None:
            return self.q_proj(x)
        return self.q_b_proj(self.q_a_layernorm(self.q_a_proj(x)))
