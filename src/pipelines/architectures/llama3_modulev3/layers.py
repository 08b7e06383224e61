"""One decoder layer on the ModuleV3 API."""

from __future__ import annotations

from typing import Any

from max.driver import CPU
from max.dtype import DType
from max.experimental import functional as F
from max.experimental.nn import Linear, Module
from max.experimental.nn.norm import LayerNorm, RMSNorm
from max.experimental.tensor import Tensor
from max.graph import TensorValue, Value
from max.nn.attention import MHAMaskVariant
from max.nn.kernels import flash_attention_ragged, rope_split_store_ragged

from unispec.kv_cache.views import take_caches
from unispec.pipelines.targets.llama.config import Llama3Config

__all__ = ["DecoderLayer", "layer_index", "norm"]


def norm(config: Llama3Config) -> RMSNorm | LayerNorm:
    """The configured norm over the residual stream, `[T, H]` to `[T, H]`."""
    if config.norm_method == "rms_norm":
        return RMSNorm(config.hidden_size, config.norm_eps)
    return LayerNorm(
        config.hidden_size,
        config.norm_eps,
        keep_dtype=False,
        elementwise_affine=config.norm_elementwise_affine,
    )


class DecoderLayer(Module[..., Tensor]):
    """Attention and MLP, each after a norm and around a residual."""

    def __init__(self, config: Llama3Config) -> None:
        self.self_attn = Attention(config)
        self.mlp = StackedMLP(config) if config.stacked_mlp else GatedMLP(config)
        self.input_layernorm = norm(config)
        self.post_attention_layernorm = norm(config)
        self.residual_multiplier = config.residual_multiplier

    def forward(
        self, layer: Tensor, x: Tensor, table: Tensor, row_offsets: Tensor, *cache: Tensor
    ) -> Tensor:
        """Runs the layer over ragged rows and writes their keys and values.

        Args:
            layer: uint32 scalar on the CPU, the layer's index in the cache.
            row_offsets: uint32 `[B + 1]`.
            cache: the graph's cache inputs.
        """
        attended = self.self_attn(layer, self.input_layernorm(x), table, row_offsets, *cache)
        x = x + attended * self.residual_multiplier
        return x + self.mlp(self.post_attention_layernorm(x)) * self.residual_multiplier


class Attention(Module[..., Tensor]):
    """Causal attention with grouped queries and rotary embeddings over a paged cache."""

    def __init__(self, config: Llama3Config) -> None:
        self.config = config
        query = config.num_attention_heads * config.head_dim
        key = config.num_key_value_heads * config.head_dim
        hidden, bias = config.hidden_size, config.attention_bias
        if config.stacked_qkv:
            self.qkv_proj = Linear(hidden, query + 2 * key, bias=bias)
        else:
            self.q_proj = Linear(hidden, query, bias=bias)
            self.k_proj = Linear(hidden, key, bias=bias)
            self.v_proj = Linear(hidden, key, bias=bias)
        self.o_proj = Linear(query, hidden, bias=bias)

    def forward(
        self, layer: Tensor, x: Tensor, table: Tensor, row_offsets: Tensor, *cache: Tensor
    ) -> Tensor:
        """As `DecoderLayer.forward`."""
        qkv = self._project(x)
        if self.config.clip_qkv is not None:
            qkv = F.clip(qkv, -self.config.clip_qkv, self.config.clip_qkv)
        attended = _paged_attention(qkv, table, row_offsets, layer, list(cache), self.config)
        return self.o_proj(attended)

    def _project(self, x: Tensor) -> Tensor:
        """Queries, keys and values side by side, `[T, (heads + 2 * key heads) * head_dim]`."""
        if self.config.stacked_qkv:
            return self.qkv_proj(x)
        return joined([self.q_proj, self.k_proj, self.v_proj], x)


class GatedMLP(Module[[Tensor], Tensor]):
    """down(silu(gate(x)) * up(x)), Llama's MLP."""

    def __init__(self, config: Llama3Config) -> None:
        hidden, inner = config.hidden_size, config.intermediate_size
        self.gate_proj = Linear(hidden, inner, bias=False)
        self.up_proj = Linear(hidden, inner, bias=False)
        self.down_proj = Linear(inner, hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """`[T, H]` to `[T, H]`."""
        return self.down_proj(gated(joined([self.gate_proj, self.up_proj], x)))


class StackedMLP(Module[[Tensor], Tensor]):
    """`GatedMLP` of a checkpoint that has gate and up projection as one."""

    def __init__(self, config: Llama3Config) -> None:
        hidden, inner = config.hidden_size, config.intermediate_size
        self.gate_up_proj = Linear(hidden, 2 * inner, bias=False)
        self.down_proj = Linear(inner, hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """`[T, H]` to `[T, H]`."""
        return self.down_proj(gated(self.gate_up_proj(x)))


def gated(x: Tensor) -> Tensor:
    """The right half of `[T, 2 * N]` times silu of the left half."""
    gate, up = F.chunk(x, 2, axis=-1)
    product: Tensor = F.silu(gate) * up
    return product


def joined(layers: list[Linear], x: Tensor) -> Tensor:
    """Outputs of linear layers over the same `[T, H]` side by side, in one product."""
    y: Tensor = x @ F.concat([layer.weight for layer in layers]).T
    biases = [layer.bias for layer in layers if isinstance(layer.bias, Tensor)]
    return y + F.concat(biases) if biases else y


def _attend(
    qkv: TensorValue,
    table: TensorValue,
    row_offsets: TensorValue,
    layer: TensorValue,
    cache: list[Value[Any]],
    config: Llama3Config,
) -> TensorValue:
    """Rotates, stores and attends; `[T, heads * head_dim]`."""
    (paged,) = take_caches(config.kv_params, iter(cache))
    heads = config.num_attention_heads
    query = rope_split_store_ragged(
        config.kv_params,
        qkv,
        row_offsets,
        table,
        paged,
        layer,
        heads,
        interleaved=config.interleaved_rope_weights,
    )
    attended = flash_attention_ragged(
        config.kv_params,
        query.reshape([qkv.shape[0], heads, config.head_dim]),
        row_offsets,
        paged,
        layer,
        MHAMaskVariant.CAUSAL_MASK,
        config.attention_multiplier,
    )
    return attended.reshape([qkv.shape[0], heads * config.head_dim])


# As an operation on ModuleV3 tensors.
_paged_attention = F.functional(_attend)


def layer_index(index: int) -> Tensor:
    """The uint32 scalar that cache kernels take as a layer's index."""
    return F.constant(index, DType.uint32, device=CPU())
