"""The manager of both caches' pages: MAX's own, with room for drafts."""

from __future__ import annotations

from dataclasses import replace

from max.nn.kv_cache import KVCacheParamInterface, KVCacheParams
from max.pipelines.kv_cache import PagedKVCacheManagerInterface

from .max_jenga import NextTokenPages, SharedPages

__all__ = ["make_cache_manager", "pages_per_row", "with_room"]


def with_room(params: KVCacheParamInterface, drafts: int) -> KVCacheParamInterface:
    """The cache of a target alone, with room for drafts of a row that a step verifies.

    Args:
        params: of one cache; a tree, which has room for its draft's, has enough for as many.
        drafts: the most of a row that are looked up.
    """
    if isinstance(params, KVCacheParams) and drafts > params.num_draft_tokens:
        return replace(params, num_draft_tokens=drafts)
    return params


def pages_per_row(params: KVCacheParamInterface, max_length: int) -> int:
    """Pages that a row of `max_length` tokens holds at most, drafts included.

    A step writes K draft positions after the row's tokens, and while the draft proposes
    K - 1 more, one after the other, or K + 1 more, as a block.

    Args:
        params: the cache, or the tree of both.
        max_length: of the row, prompt and output.
    """
    return -(-(max_length + 2 * params.num_draft_tokens + 1) // params.page_size)


def make_cache_manager(
    params: KVCacheParamInterface,
    *,
    num_pages: int,
    max_batch_size: int,
    draft_reads_next_token: bool,
) -> PagedKVCacheManagerInterface:
    """Allocates the pages of target and draft; one page id names a page in both.

    Args:
        params: the target's cache, or a tree with the children `target` and `draft`.
        num_pages: pages in all, of each replica.
        max_batch_size: most rows in one step, of each replica.
        draft_reads_next_token: the draft's entry of a position depends on the token
            after it (EAGLE, MTP), so pages are shared only where that token agrees.

    Raises:
        InputError: pages are to be kept off the device as well.
    """
    pages = NextTokenPages if draft_reads_next_token else SharedPages
    return pages(params, num_pages=num_pages, max_batch_size=max_batch_size)
