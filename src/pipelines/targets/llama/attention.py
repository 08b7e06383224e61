"""Attention of a Llama layer, over all devices' kernels."""

from __future__ import annotations

from typing import Final

from max.dtype import DType
from max.graph import TensorValue, ops
from max.nn import Module, RMSNorm
from max.nn.attention import MHAMaskVariant
from max.nn.kernels import (
    flash_attention_ragged,
    kv_cache_store_paged_ragged,
    rope_ragged,
    rope_split_store_ragged,
)
from max.nn.kv_cache import PagedCacheValues
from max.nn.rotary_embedding import RotaryEmbedding

from unispec.kernels.operations import (
    Attending,
    AttentionHalf,
    attention,
    can_join,
    store,
)
from unispec.pipelines.layers.linear import Linear, add_linear, as_norm, fused_linear, normed_linear

from .stack_config import StackConfig

__all__ = ["Attention"]

# What the kernel for a CPU needs of a head's width and of a page's tokens.
_LANES: Final = 16
_CHUNK: Final = 64


class Attention(Module):
    """Causal attention, grouped queries, with rotary embeddings.

    Args:
        input_size: columns of what queries, keys and values read; None: the stack's hidden size.
    """

    def __init__(
        self, config: StackConfig, rope: RotaryEmbedding, *, input_size: int | None = None
    ) -> None:
        super().__init__()
        self.rope = rope
        self.kv_params = config.kv_params
        self.scale = config.attention_multiplier
        self.heads, self.key_heads = config.num_attention_heads, config.num_key_value_heads
        self.head_dim = config.head_dim
        self.dtype, self.device = dtype, device = config.dtype, config.devices[0]
        size, biased = input_size or config.hidden_size, config.attention_bias or config.qkv_bias
        query, key = self.heads * self.head_dim, self.key_heads * self.head_dim
        self.q_proj = Linear(size, query, dtype, device, has_bias=biased)
        self.k_proj = Linear(size, key, dtype, device, has_bias=biased)
        self.v_proj = Linear(size, key, dtype, device, has_bias=biased)
        self.o_proj = Linear(
            query, config.hidden_size, dtype, device, has_bias=config.attention_bias
        )
        self.has_qk_norm = config.qk_norm
        if config.qk_norm:
            self.q_norm = RMSNorm(self.head_dim, dtype, config.norm_eps)
            self.k_norm = RMSNorm(self.head_dim, dtype, config.norm_eps)
        self.has_own_kernel = (
            device.is_cpu()
            and dtype == config.kv_params.dtype == DType.float32
            and self.head_dim % _LANES == 0
            and config.kv_params.page_size % _CHUNK == 0
        )

    def __call__(
        self,
        residual: TensorValue,
        x: TensorValue,
        attending: Attending,
        *,
        norm: RMSNorm | None,
        factor: float = 1.0,
    ) -> TensorValue:
        """Attends from `norm(x)`, writes keys and values, and adds to the residual, `[T, H]`.

        Args:
            x: `[T, input size]`.
            attending: see `attending`.
            norm: before the projections; None: none.
            factor: of what is added.
        """
        qkv = normed_linear(x, norm, [self.q_proj, self.k_proj, self.v_proj])
        if self.has_qk_norm:
            qkv = self._with_normed_heads(qkv)
        attend = attention if self.has_own_kernel else self._attend
        return add_linear(residual, attend(qkv, attending), self.o_proj, factor)

    def half(
        self,
        residual: TensorValue,
        x: TensorValue,
        attending: Attending,
        *,
        norm: RMSNorm | None,
        factor: float,
    ) -> AttentionHalf | None:
        """What a call with the same arguments computes, where one operation can."""
        if not self.has_own_kernel or not self.is_plain:
            return None
        matrices = [one.matrix for one in (self.q_proj, self.k_proj, self.v_proj)]
        if not can_join(matrices):
            return None
        before = as_norm(norm)
        return AttentionHalf(x, residual, before, matrices, self.o_proj.matrix, attending, factor)

    def store(self, x: TensorValue, attending: Attending, *, norm: RMSNorm | None) -> None:
        """Writes the keys and values that a call with the same arguments would, and no more."""
        key, value = self.k_proj, self.v_proj
        if self.has_own_kernel and self.is_plain:
            store(x, as_norm(norm), key.matrix, value.matrix, attending)
            return
        keys, values = (
            part.reshape([x.shape[0], self.key_heads, self.head_dim])
            for part in fused_linear(x if norm is None else norm(x), [key, value])
        )
        if self.has_qk_norm:
            keys = self.k_norm(keys)
        offsets, cache = attending.row_offsets, attending.cache
        keys = rope_ragged(
            keys,
            offsets,
            cache.cache_lengths,
            attending.freqs_cis,
            interleaved=self.rope.interleaved,
        )
        for which, entry in enumerate((keys, values)):
            kv_cache_store_paged_ragged(cache, entry, offsets, attending.layer, key_or_value=which)

    def attending(
        self,
        layer: TensorValue,
        cache: PagedCacheValues,
        freqs_cis: TensorValue,
        row_offsets: TensorValue,
    ) -> Attending:
        """What attention reads beside queries, keys and values."""
        return Attending(
            row_offsets,
            freqs_cis.cast(self.dtype).to(self.device),
            cache,
            layer,
            heads=self.heads,
            key_heads=self.key_heads,
            head_dim=self.head_dim,
            scale=self.scale,
            interleaved=self.rope.interleaved,
        )

    @property
    def is_plain(self) -> bool:
        """Whether nothing happens between projections and attention."""
        biases = (self.q_proj.bias, self.o_proj.bias)
        return not self.has_qk_norm and all(bias is None for bias in biases)

    def _attend(self, qkv: TensorValue, attending: Attending) -> TensorValue:
        """Attention by MAX's kernels, `[T, heads * head_dim]`."""
        query = rope_split_store_ragged(
            self.kv_params,
            qkv,
            attending.row_offsets,
            attending.freqs_cis,
            attending.cache,
            attending.layer,
            self.heads,
            interleaved=self.rope.interleaved,
        )
        attended = flash_attention_ragged(
            self.kv_params,
            query.reshape([-1, self.heads, self.head_dim]),
            attending.row_offsets,
            attending.cache,
            attending.layer,
            MHAMaskVariant.CAUSAL_MASK,
            self.scale,
        )
        return attended.reshape([qkv.shape[0], self.heads * self.head_dim])

    def _with_normed_heads(self, qkv: TensorValue) -> TensorValue:
        width, keys = self.head_dim, self.key_heads * self.head_dim
        query, key, value = ops.split(qkv, [self.heads * width, keys, keys], axis=-1)
        query = self.q_norm(query.reshape([-1, width])).reshape(query.shape)
        key = self.k_norm(key.reshape([-1, width])).reshape(key.shape)
        return ops.concat([query, key, value], axis=-1)
