"""How many cache pages a memory plan has room for, and a plan with room for a number of pages."""

from __future__ import annotations

from dataclasses import replace

from max.nn.kv_cache import KVCacheParamInterface
from max.pipelines.lib import MemoryPlan

from unispec.errors import InputError
from unispec.kv_cache.manager import pages_per_row

__all__ = ["longest_row", "planned_pages", "with_pages"]


def planned_pages(params: KVCacheParamInterface, plan: MemoryPlan, *, exact: bool) -> int:
    """Pages of each replica for which a plan has memory.

    Args:
        params: the cache, or the tree of both.
        plan: has a length and the memory of the cache.
        exact: whether `with_pages` made it, and requests are kept so short that they fit. Else it
            may have more memory than all rows can fill, and MAX's scheduler ends with an error
            where a row of its length does not fit.

    Raises:
        InputError: a row of the plan's length does not fit.
    """
    assert plan.available_cache_memory is not None and plan.planned_max_length is not None
    # The manager allocates one page more than it is asked for.
    pages = plan.available_cache_memory // _page_bytes(params) - 1
    if exact:
        return pages
    needed = pages_per_row(params, plan.planned_max_length)
    if pages < needed:
        raise InputError(
            f"the memory that is left for the cache holds {max(pages, 0)} pages, and one request of"
            f" up to {plan.planned_max_length} tokens needs {needed}: lower --max-length"
        )
    return min(pages, needed * plan.planned_max_batch_size)


def with_pages(params: KVCacheParamInterface, plan: MemoryPlan, num_pages: int) -> MemoryPlan:
    """The plan with memory for exactly so many pages of each replica."""
    return replace(plan, available_cache_memory=(num_pages + 1) * _page_bytes(params))


def longest_row(params: KVCacheParamInterface, num_pages: int) -> int:
    """Tokens of the longest request, prompt and answer, for which so many pages suffice."""
    return num_pages * params.page_size - 2 * params.num_draft_tokens - 1


def _page_bytes(params: KVCacheParamInterface) -> int:
    """Bytes of one page of each replica."""
    return int(params.bytes_per_block) * params.data_parallel_degree
