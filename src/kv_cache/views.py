"""In-graph views of a paged cache."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

from max import tree
from max.dtype import DType
from max.graph import BufferValue, DeviceRef, TensorValue, Value, ops
from max.nn.kv_cache import (
    KVCacheInputsPerDevice,
    KVCacheParamInterface,
    MultiKVCacheParams,
    PagedCacheValues,
)
from max.pipelines.speculative.block_driver import block_dispatch_metadata

__all__ = [
    "as_one_batch",
    "earlier_view",
    "grown_view",
    "on_device_of",
    "take_caches",
    "take_copies",
]


def take_caches(
    params: KVCacheParamInterface, inputs: Iterator[Value[Any]]
) -> list[PagedCacheValues]:
    """Takes the graph inputs of the caches: the target's, then the draft's if any.

    Args:
        params: the cache, or a tree of caches with the children `target` and `draft`.
        inputs: graph inputs, in the order of `params.get_symbolic_inputs()`.

    Returns:
        Paged caches on the first device, whose batch dimension is named `batch` if there are no
        replicas.
    """
    return [copies[0] for copies in take_copies(params, inputs)]


def take_copies(
    params: KVCacheParamInterface, inputs: Iterator[Value[Any]]
) -> list[list[PagedCacheValues]]:
    """As `take_caches`, but each cache as every device has it.

    Args:
        params: the cache, or a tree of caches with the children `target` and `draft`.
        inputs: graph inputs, in the order of `params.get_symbolic_inputs()`.

    Returns:
        For each cache one paged cache a device, the first device's first. Those of replicas,
        which have different rows, keep the names of their batch dimensions.
    """
    values: Any = params.unflatten_kv_inputs(inputs)
    branches = (
        [values[name] for name in params.children]
        if isinstance(params, MultiKVCacheParams)
        else [values]
    )
    found = [tree.leaves(branch, leaf=KVCacheInputsPerDevice) for branch in branches]
    if params.data_parallel_degree > 1:
        return found
    return [[_bind_batch(copy) for copy in copies] for copies in found]


def as_one_batch(copies: Sequence[PagedCacheValues]) -> PagedCacheValues:
    """The first device's cache, its lengths those of all rows, of whatever replica.

    Its pages and all else stay the first replica's.

    Args:
        copies: of one cache, from `take_copies`.
    """
    first, *others = copies
    if not others or first.cache_lengths.shape == others[0].cache_lengths.shape:
        return first
    device = first.cache_lengths.device
    lengths = ops.concat([copy.cache_lengths.to(device) for copy in copies])
    return replace(first, cache_lengths=ops.rebind(lengths, ["batch"]))


def earlier_view(
    cache: PagedCacheValues, counts: TensorValue, longest: TensorValue
) -> PagedCacheValues:
    """The cache as it was before the last tokens of each row, which the step reads anew.

    Args:
        cache: of queries and keys on one device, not of latent rows on a GPU.
        counts: uint32 `[B]`, tokens to go back in each row.
        longest: uint32 `[1]` on the CPU, the largest of them.
    """
    metadata = cache.attention_dispatch_metadata
    if metadata is not None:
        # Rows, tokens of the longest row, partitions (0: the kernel decides), longest context.
        width = metadata[1:2] + longest.cast(DType.int64)
        partitions = ops.constant([0], DType.int64, device=DeviceRef.CPU())
        metadata = ops.concat([metadata[0:1], width, partitions, metadata[3:4]])
    return replace(
        cache,
        cache_lengths=cache.cache_lengths - counts,
        max_prompt_length=cache.max_prompt_length + longest,
        attention_dispatch_metadata=metadata,
    )


def grown_view(
    cache: KVCacheInputsPerDevice[TensorValue, BufferValue], cache_lengths: TensorValue, width: int
) -> PagedCacheValues:
    """The cache as a draft step sees it that adds tokens beyond the verified ones.

    Args:
        cache: the draft's cache.
        cache_lengths: uint32 `[B]`, tokens of each row before this step.
        width: how many tokens the step adds to each row.
    """
    metadata = cache.draft_attention_dispatch_metadata
    if width > 1 and cache.attention_dispatch_metadata is not None:
        metadata = block_dispatch_metadata(cache.attention_dispatch_metadata, width)
    return replace(
        cache,
        cache_lengths=cache_lengths,
        max_prompt_length=ops.constant([width], DType.uint32, device=DeviceRef.CPU()),
        attention_dispatch_metadata=metadata,
        mla_num_partitions=cache.draft_mla_num_partitions,
    )


def on_device_of(
    copy: PagedCacheValues, view: PagedCacheValues, cache_lengths: TensorValue
) -> PagedCacheValues:
    """A view of the first device's cache, made of one device's copy.

    Args:
        copy: the cache as the device has it.
        view: the cache as the first device sees it.
        cache_lengths: uint32 `[B]`, the view's on that device, of the rows that it has.
    """
    grown = view.attention_dispatch_metadata is view.draft_attention_dispatch_metadata
    return replace(
        copy,
        cache_lengths=cache_lengths,
        max_prompt_length=view.max_prompt_length,
        attention_dispatch_metadata=copy.draft_attention_dispatch_metadata
        if grown
        else copy.attention_dispatch_metadata,
        mla_num_partitions=copy.draft_mla_num_partitions if grown else copy.mla_num_partitions,
    )


def _bind_batch(cache: PagedCacheValues) -> PagedCacheValues:
    pages = cache.lookup_table.shape[1]
    return replace(
        cache,
        cache_lengths=ops.rebind(cache.cache_lengths, ["batch"]),
        lookup_table=ops.rebind(cache.lookup_table, ["batch", pages]),
    )
