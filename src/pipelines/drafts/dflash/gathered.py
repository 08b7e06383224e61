"""Attention over keys and values gathered from the cache, for windows on a CPU.

max 26.7 compiles no attention with a window for a CPU, and its gather reads caches of one head.
So all heads of a token are one wide head in the cache of a draft that needs this.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Final

from max.dtype import DType
from max.graph import DeviceRef, TensorValue, ops
from max.nn.kernels import kv_cache_gather_rows_ragged
from max.nn.kv_cache import KVCacheParams, MHAKVCacheParams, PagedCacheValues

__all__ = ["gathered_attention", "is_gathered", "wide_head"]

_HIDDEN: Final = -1e30
"""Score of what a token does not see."""


def is_gathered(windows: Sequence[int | None], device: DeviceRef) -> bool:
    """Whether the draft's layers need gathered attention, all of them if one does.

    Args:
        windows: of each layer in tokens, None where it sees the whole context.
    """
    return device.is_cpu() and any(window is not None for window in windows)


def wide_head(params: KVCacheParams) -> KVCacheParams:
    """A cache with the same room whose tokens have one head."""
    assert isinstance(params, MHAKVCacheParams)
    return replace(params, n_kv_heads=1, head_dim=params.n_kv_heads * params.head_dim)


def gathered_attention(
    query: TensorValue,
    cache: PagedCacheValues,
    layer: TensorValue,
    *,
    key_heads: int,
    scale: float,
    window: int | None,
    causal: bool,
) -> TensorValue:
    """Attention of a block of S tokens at the end of each row, whose keys are stored.

    Args:
        query: `[B, S, heads, head_dim]`; token s of row b is at `cache.cache_lengths[b] + s`.
        cache: of one head `[key_heads * head_dim]` wide.
        layer: uint32 scalar, the layer's index in the cache.
        window: of the positions before it a token sees the last `window - 1`; None: all.
        causal: whether it sees none of the block's tokens after it.

    Returns:
        `[B, S, heads, head_dim]`.
    """
    batch, size, heads, width = query.shape
    int64, device = DType.int64, query.device
    lengths = cache.cache_lengths.cast(int64)  # [B]
    behind = ops.max(lengths, axis=0).reshape([])
    if window is not None:
        behind = ops.min(behind, window - 1)
    seen = "num_seen" if window is None else f"num_seen_in_{window}"
    steps = ops.range(-behind, int(size), 1, out_dim=seen, dtype=int64, device=device)  # [N]
    positions = ops.unsqueeze(lengths, 1) + steps  # [B, N], negative before the row's first token
    slots = ops.max(positions, 0).cast(DType.int32)
    offsets = ops.range(0, batch + 1, 1, out_dim=batch + 1, dtype=DType.uint32, device=device)
    key, value = (
        kv_cache_gather_rows_ragged(cache, slots, offsets, layer, key_or_value=which)
        .reshape([batch, seen, key_heads, width])
        .permute([0, 2, 1, 3])  # [B, key_heads, N, head_dim]
        for which in (0, 1)
    )

    groups = heads // key_heads
    query = query.reshape([batch, size, key_heads, groups, width]).permute([0, 2, 3, 1, 4])
    scores = query.reshape([batch, key_heads, groups * size, width]) @ key.permute([0, 1, 3, 2])
    scores = scores.reshape([batch, heads, size, seen]).cast(DType.float32) * scale
    shown = ops.constant(0.0, DType.float32, device=device)
    hidden = ops.constant(_HIDDEN, DType.float32, device=device)
    scores = scores + ops.where(positions >= 0, shown, hidden).reshape([batch, 1, 1, seen])
    if window is not None or causal:
        # Added one by one, and always both: max 26.7 broadcasts wrongly where masks of these
        # shapes are joined first, and does so by itself where there is one for all rows.
        own = ops.range(0, int(size), 1, out_dim=size, dtype=int64, device=device)
        distance = ops.unsqueeze(own, 1) - steps  # [S, N]
        nearest = 0 if causal else 1 - int(size)
        scores = scores + ops.where(distance >= nearest, shown, hidden)
        farthest = window - 1 if window is not None else behind + int(size)
        scores = scores + ops.where(distance <= farthest, shown, hidden)
    weights = ops.softmax(scores).cast(value.dtype)
    attended: TensorValue = weights.reshape([batch, key_heads, groups * size, seen]) @ value
    return attended.reshape([batch, heads, size, width]).permute([0, 2, 1, 3])
