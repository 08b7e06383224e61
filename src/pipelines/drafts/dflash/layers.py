"""One layer of a DFlash draft."""

from __future__ import annotations

from typing import Final

from max.graph import TensorValue
from max.nn import Module, RMSNorm
from max.nn.attention import MHAMaskVariant
from max.nn.kernels import flash_attention_ragged, kv_cache_store_paged_ragged, rope_ragged
from max.nn.kv_cache import PagedCacheValues

from unispec.pipelines.layers.linear import GatedMLP, Linear, add_linear, fused_linear
from unispec.pipelines.targets.llama.stack_config import StackConfig

from .gathered import gathered_attention

__all__ = ["DflashAttention", "DflashLayer"]

# By whether there is a window, and whether it is causal.
_MASKS: Final = {
    (False, False): MHAMaskVariant.NULL_MASK,
    (False, True): MHAMaskVariant.CAUSAL_MASK,
    (True, False): MHAMaskVariant.SLIDING_WINDOW_NONCAUSAL_MASK,
    (True, True): MHAMaskVariant.SLIDING_WINDOW_CAUSAL_MASK,
}


class DflashAttention(Module):
    """Attention over cached keys and values, with a norm per query and key head as in Qwen 3.

    Args:
        window: of the positions before it a query sees the last `window - 1`; None: all.
        causal: whether it sees none of the block's slots after it.
        gathered: whether a key's heads are one wide head in the cache; see `gathered_attention`.
    """

    def __init__(
        self, config: StackConfig, *, window: int | None, causal: bool, gathered: bool
    ) -> None:
        super().__init__()
        self.kv_params = config.kv_params
        self.gathered = gathered
        self.num_key_value_heads = config.num_key_value_heads
        self.scale = config.attention_multiplier
        self.window = window
        self.causal = causal
        self.query_width = config.num_attention_heads * config.head_dim
        key_width = config.num_key_value_heads * config.head_dim
        self.q_proj = _linear(config, config.hidden_size, self.query_width)
        self.k_proj = _linear(config, config.hidden_size, key_width)
        self.v_proj = _linear(config, config.hidden_size, key_width)
        self.o_proj = _linear(config, self.query_width, config.hidden_size)
        self.q_norm = RMSNorm(config.head_dim, config.dtype, config.norm_eps)
        self.k_norm = RMSNorm(config.head_dim, config.dtype, config.norm_eps)

    def store(
        self,
        layer: TensorValue,
        key: TensorValue,
        value: TensorValue,
        cache: PagedCacheValues,
        freqs_cis: TensorValue,
        row_offsets: TensorValue,
    ) -> None:
        """Norms and rotates keys and writes them and their values.

        Args:
            key: `[T, key heads * head_dim]` from `k_proj`.
            value: `[T, key heads * head_dim]` from `v_proj`.
        """
        count, width = self.num_key_value_heads, self.kv_params.head_dim
        key = self.k_norm(key.reshape([key.shape[0], count, width]))
        key = rope_ragged(key, row_offsets, cache.cache_lengths, freqs_cis, interleaved=False)
        heads = [1, count * width] if self.gathered else [count, width]
        for which, entry in enumerate((key, value)):
            rows = entry.reshape([entry.shape[0], *heads])
            kv_cache_store_paged_ragged(cache, rows, row_offsets, layer, key_or_value=which)

    def __call__(
        self,
        layer: TensorValue,
        x: TensorValue,
        cache: PagedCacheValues,
        freqs_cis: TensorValue,
        row_offsets: TensorValue,
    ) -> TensorValue:
        """Stores the block's keys and values and attends; what `o_proj` reads."""
        query, key, value = fused_linear(x, [self.q_proj, self.k_proj, self.v_proj])
        self.store(layer, key, value, cache, freqs_cis, row_offsets)
        query = self.q_norm(query.reshape([x.shape[0], -1, self.kv_params.head_dim]))
        query = rope_ragged(query, row_offsets, cache.cache_lengths, freqs_cis, interleaved=False)
        attended = self._attend(query, layer, cache, row_offsets)
        return attended.reshape([x.shape[0], self.query_width])

    def _attend(
        self,
        query: TensorValue,
        layer: TensorValue,
        cache: PagedCacheValues,
        row_offsets: TensorValue,
    ) -> TensorValue:
        """Attends from `[T, heads, head_dim]`; the result has the same shape."""
        if self.gathered:
            batch = cache.cache_lengths.shape[0]
            return gathered_attention(
                query.reshape([batch, -1, *query.shape[1:]]),
                cache,
                layer,
                key_heads=self.num_key_value_heads,
                scale=self.scale,
                window=self.window,
                causal=self.causal,
            )
        return flash_attention_ragged(
            self.kv_params,
            query,
            row_offsets,
            cache,
            layer,
            _MASKS[self.window is not None, self.causal],
            self.scale,
            local_window_size=-1 if self.window is None else self.window,
        )


class DflashLayer(Module):
    """Attention and MLP over a block, each after an RMSNorm and around a residual.

    Its arguments are those of `DflashAttention`.
    """

    def __init__(
        self, config: StackConfig, *, window: int | None, causal: bool, gathered: bool
    ) -> None:
        super().__init__()
        self.self_attn = DflashAttention(config, window=window, causal=causal, gathered=gathered)
        self.mlp = GatedMLP(
            config.hidden_size, config.intermediate_size, config.dtype, config.devices[0]
        )
        self.input_layernorm = RMSNorm(config.hidden_size, config.dtype, config.norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.dtype, config.norm_eps)

    def __call__(
        self,
        layer: TensorValue,
        x: TensorValue,
        cache: PagedCacheValues,
        freqs_cis: TensorValue,
        row_offsets: TensorValue,
    ) -> TensorValue:
        """Runs the layer over `[T, H]`; arguments as in `DflashAttention`."""
        normed = self.input_layernorm(x)
        attended = self.self_attn(layer, normed, cache, freqs_cis, row_offsets)
        x = add_linear(x, attended, self.self_attn.o_proj)
        return self.mlp.added(x, self.post_attention_layernorm)


def _linear(config: StackConfig, width_in: int, width_out: int) -> Linear:
    return Linear(
        width_in, width_out, config.dtype, config.devices[0], has_bias=config.attention_bias
    )
