"""Adapter to parts of MAX without public API: rows, copies and names of Jenga's pages.

Written against max 26.7.0 (`paged_kv_cache.jenga_cache_manager.JengaKVCacheManager` and its bases).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from max.nn.kv_cache import KVCacheGroupId, KVCacheParamInterface, KVConnectorType
from max.pipelines.context import TextContext
from max.pipelines.kv_cache import JengaKVCacheManager
from max.pipelines.kv_cache.paged_kv_cache.block_utils import hash_request_tokens
from max.pipelines.kv_cache.paged_kv_cache.jenga_block_manager import KVLeafInfo
from max.pipelines.kv_cache.paged_kv_cache.jenga_block_pool import JengaBlockPool
from max.pipelines.kv_cache.paged_kv_cache.kv_group_coordinator import FullKVGroupCoordinator
from max.pipelines.request import RequestID

from unispec.errors import InputError

__all__ = ["NextTokenPages", "SharedPages"]

_PAGES = "pages"


@dataclass(frozen=True)
class _SharedRows(FullKVGroupCoordinator):
    """One row of pages for each request, which is the row of every cache."""

    caches: tuple[str, ...]

    def forward_blocks(
        self, batch: Sequence[TextContext], num_blocks: Sequence[int]
    ) -> dict[str, list[Sequence[int]]]:
        return self._of_every_cache(super().forward_blocks(batch, num_blocks))

    def blocks_of(self, req_id: RequestID) -> dict[str, list[Any]]:
        return self._of_every_cache(super().blocks_of(req_id))

    def _of_every_cache(self, rows: Mapping[str, list[Any]]) -> dict[str, list[Any]]:
        return dict.fromkeys(self.caches, rows[_PAGES])


class SharedPages(JengaKVCacheManager):
    """Jenga's manager, but a page id names a page in every cache, as one block in its pool.

    By itself it gives each cache ids of its own, out of blocks that fit whole pages of all.

    Args:
        params: a cache, or a tree of caches.
        num_pages: pages in all, of each replica.
        max_batch_size: most rows in one step, of each replica.

    Raises:
        InputError: pages are to be kept off the device as well.
    """

    def __init__(
        self, params: KVCacheParamInterface, *, num_pages: int, max_batch_size: int
    ) -> None:
        connector = params.kv_connector_config.type
        if connector != KVConnectorType.null:
            raise InputError(
                f"kv_connector {connector.value} is not supported: pages of draft and target are"
                " kept on the device only; leave it out"
            )
        # Page 0 is the one that tables name where a row has none.
        pools = [
            JengaBlockPool(num_pages + 1, {_PAGES: 1}) for _ in range(params.data_parallel_degree)
        ]
        buffers = params.allocate_buffers(num_pages + 1)
        everything = KVCacheGroupId.full()
        rows = _SharedRows(pools, _PAGES, everything, params.page_size, tuple(params.leaves()))
        super().__init__(
            params=params,
            leaf_infos={_PAGES: KVLeafInfo(ratio=1, group_id=everything)},
            pools=pools,
            kv_buffers=buffers,
            replica_kv_memory=[buffer.to_memory() for buffer in buffers],
            max_batch_size=max_batch_size,
            max_seq_len=num_pages * params.page_size,
            groups={_PAGES: rows},
        )

    @property
    def effective_max_seq_length(self) -> int:
        """Tokens that all pages of a replica hold."""
        return int(self.pools[0].num_allocatable_huge_blocks * self.params.page_size)

    def _submit_page_copies(self, dst_replica: int, copies: Sequence[Any]) -> int:
        caches = self.params.leaves()
        every = [replace(copy, leaf_id=cache) for copy in copies for cache in caches]
        return int(super()._submit_page_copies(dst_replica, every))


class NextTokenPages(SharedPages):
    """A cached page matches only where the token after it matches too.

    Row i of an EAGLE or MTP draft reads token i + 1. A page's last draft entry
    therefore depends on a token of the following page, which MAX's page names
    leave out: two prompts that part at a page's end would share that entry.
    """

    def _compute_block_hashes(
        self, ctx: TextContext, existing_hashes: Sequence[bytes]
    ) -> list[bytes]:
        size = self.params.page_size
        start = len(existing_hashes) * size
        end = start + (len(ctx.tokens) - 1 - start) // size * size
        if end <= start:
            return []
        return hash_request_tokens(
            token_ids=ctx.tokens[start + 1 : end + 1],
            block_size=size,
            parent_hash=existing_hashes[-1] if existing_hashes else None,
            algo=self.params.kv_hash_algo,
            seed=self.params.kv_hash_seed,
            # The window starts at the second token, so the first one is named here.
            salt=f"{int(ctx.tokens[0])}/{ctx.cache_salt or ''}",
        )

    def _compute_hashes_for_request(self, ctx: TextContext) -> list[bytes]:
        hashes: list[bytes] = self._state_of(ctx).hashes
        hashes.extend(self._compute_block_hashes(ctx, hashes))
        return hashes
