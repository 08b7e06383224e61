"""Which layers run on which device: nothing else of the stack asks where it runs.

On a CPU they are those of this package. On GPUs they are MAX's, for its kernels of latent attention
and of experts run nowhere else; several GPUs share each of them by tensor parallelism, or have
attention and dense MLPs whole and some of the experts each.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, Final

from max.dtype import DType
from max.graph import ShardingStrategy, TensorValue, Value
from max.nn import (
    MLP,
    ColumnParallelLinear,
    Module,
    RMSNorm,
    VocabParallelEmbedding,
)
from max.nn.attention.multi_latent_attention import LatentAttentionWithRope, MLAPrefillMetadata
from max.nn.attention.multi_latent_attention_fp8 import LatentAttentionWithRopeFp8
from max.nn.comm.ep import EPBatchManager
from max.nn.kv_cache import PagedCacheValues
from max.nn.moe import MoE, MoEQuantized, forward_moe_sharded_layers

from unispec.pipelines.layers.linear import Embedding, GatedMLP, Linear

from .attention import AbsorbedLatentAttention
from .config import DeepseekV3Config
from .experts import TiledExperts
from .gate import GroupLimitedGate
from .rope import rotary_embedding

__all__ = [
    "embedding",
    "experts",
    "head",
    "latent_attention",
    "mlp",
    "prefill_plans",
    "shards",
    "store",
    "through_mlps",
    "unpacked",
]

_FLOAT8: Final = DType.float8_e4m3fn
_ONE_CHUNK: Final = 1 << 30
"""Tokens that a prefill may expand at once; what is allocated follows from the batch."""


def latent_attention(config: DeepseekV3Config) -> Module:
    """The attention of a layer, called with index, states, cache, rotary table and row offsets."""
    if not config.on_gpus:
        return AbsorbedLatentAttention(config)
    shared: dict[str, Any] = {
        # Asked for nothing but to scale the scores, which `softmax_scale` has done.
        "rope": rotary_embedding(config, scaled=False),
        "scale": config.softmax_scale,
        "num_attention_heads": config.num_attention_heads,
        "num_key_value_heads": 1,
        "hidden_size": config.hidden_size,
        "kv_params": config.kv_params,
        "devices": config.devices,
        "q_lora_rank": config.q_lora_rank,
        "kv_lora_rank": config.kv_lora_rank,
        "qk_nope_head_dim": config.qk_nope_head_dim,
        "qk_rope_head_dim": config.qk_rope_head_dim,
        "v_head_dim": config.v_head_dim,
        "buffer_size": _ONE_CHUNK,
    }
    if config.fp8 is None:
        return LatentAttentionWithRope(**shared, dtype=config.dtype)
    return LatentAttentionWithRopeFp8(**shared, quant_config=config.fp8, norm_dtype=config.dtype)


def store(attention: Any, layer: TensorValue, x: TensorValue, *others: Any) -> None:
    """Writes what a call of a layer's attention with the same arguments writes to the cache.

    MAX's layers have no way to do that alone, so they attend as well.
    """
    if isinstance(attention, AbsorbedLatentAttention):
        attention.store(layer, x, *others)
    else:
        attention(layer, x, *others)


def mlp(config: DeepseekV3Config) -> Module:
    """The MLP of a dense layer, `[T, H]` to `[T, H]`."""
    hidden, inner = config.hidden_size, config.intermediate_size
    if not config.on_gpus:
        return GatedMLP(hidden, inner, config.dtype, config.devices[0])
    dtype = config.dtype if config.fp8 is None else _FLOAT8
    return MLP(dtype, None, hidden, inner, config.devices, quant_config=config.fp8)


def experts(config: DeepseekV3Config) -> Module:
    """The experts of a layer and their router, `[T, H]` to `[T, H]`."""
    if not config.on_gpus:
        return TiledExperts(config)
    inner = config.moe_intermediate_size
    spread: dict[str, Any] = {}
    if config.ep is not None:
        spread = {"ep_size": len(config.devices), "ep_batch_manager": EPBatchManager(config.ep)}
    layer, dtype = (MoE, config.dtype) if config.fp8 is None else (MoEQuantized, _FLOAT8)
    return layer(
        config.devices,
        config.hidden_size,
        config.n_routed_experts,
        config.num_experts_per_tok,
        inner,
        gate_cls=partial(GroupLimitedGate, config),
        dtype=dtype,
        quant_config=config.fp8,
        shared_experts_dim=inner * config.n_shared_experts,
        has_shared_experts=True,
        **spread,
    )


def embedding(config: DeepseekV3Config) -> Embedding | VocabParallelEmbedding:
    """The embedding; several devices have a part of its rows each."""
    if len(config.devices) > 1:
        return VocabParallelEmbedding(
            config.vocab_size, config.hidden_size, config.dtype, config.devices
        )
    return Embedding(config.vocab_size, config.hidden_size, config.dtype, config.devices[0])


def head(
    config: DeepseekV3Config, embedding: Embedding | VocabParallelEmbedding
) -> Linear | ColumnParallelLinear:
    """The head; several devices have a part of its rows each.

    Args:
        embedding: the stack's, whose weight a tied head has.
    """
    hidden, vocab, dtype = config.hidden_size, config.vocab_size, config.dtype
    tied = embedding.weight if config.tie_word_embeddings else None
    if len(config.devices) > 1:
        return ColumnParallelLinear(hidden, vocab, dtype, config.devices, tied)
    linear = Linear(hidden, vocab, dtype, config.devices[0])
    if tied is not None:
        linear.set_shared_weight("weight", tied)
    return linear


def shards(module: Any, config: DeepseekV3Config) -> list[Any]:
    """The module as each device runs it.

    Args:
        module: a layer of this file, or a norm, which all devices have whole.
    """
    count = len(config.devices)
    if count == 1:
        return [module]
    if isinstance(module, RMSNorm):
        strategy = ShardingStrategy.replicate(count)
    elif config.ep is None:
        strategy = ShardingStrategy.tensor_parallel(count)
    elif isinstance(module, MoE):
        strategy = ShardingStrategy.expert_parallel(count)
    else:
        strategy = ShardingStrategy.replicate(count)
    module.sharding_strategy = strategy
    return list(module.shard(config.devices))


def through_mlps(
    mlps: Sequence[Any], xs: Sequence[TensorValue], ep_inputs: Sequence[Value[Any]]
) -> list[TensorValue]:
    """Runs a layer's experts, or its MLP, on every device: `[T, H]` each."""
    first = mlps[0]
    if not isinstance(first, MoE) or not ep_inputs:
        return [mlp(x) for mlp, x in zip(mlps, xs, strict=True)]
    first.ep_batch_manager.fetch_buffers(ep_inputs)
    return forward_moe_sharded_layers(mlps, list(xs))


def prefill_plans(
    attention: Sequence[Any],
    row_offsets: Sequence[TensorValue],
    caches: Sequence[PagedCacheValues],
    context_lengths: Sequence[TensorValue],
) -> list[list[TensorValue]]:
    """How a prefill expands the cache, made once for all layers.

    Args:
        attention: any layer's, one a device.
        row_offsets: uint32 `[B + 1]`, one a device.
        context_lengths: int32 `[1]` on the host, one a device: cached tokens in pages.

    Returns:
        The tensors of each device's plan; none where attention needs no plan.
    """
    if not isinstance(attention[0], LatentAttentionWithRope | LatentAttentionWithRopeFp8):
        return [[] for _ in attention]
    plans = [
        layer.create_mla_prefill_metadata(offsets, cache)
        for layer, offsets, cache in zip(attention, row_offsets, caches, strict=True)
    ]
    # The host knows the lengths too; the plan's own would have to be waited for.
    return [
        [plan.buffer_row_offsets, plan.cache_offsets, length]
        for plan, length in zip(plans, context_lengths, strict=True)
    ]


def unpacked(plan: Sequence[TensorValue]) -> list[MLAPrefillMetadata]:
    """One of `prefill_plans` as the last argument of a layer's attention, if it takes one."""
    return [MLAPrefillMetadata(*plan)] if plan else []
