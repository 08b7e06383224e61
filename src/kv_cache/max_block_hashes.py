"""Adapter to a part of MAX without public API: how the block manager names cached pages.

Written against max 26.7.0 (`paged_kv_cache.block_manager.BlockManager`).
"""

from __future__ import annotations

from max.pipelines.context import TextContext
from max.pipelines.kv_cache import PagedKVCacheManager
from max.pipelines.kv_cache.paged_kv_cache.block_manager import BlockManager
from max.pipelines.kv_cache.paged_kv_cache.block_utils import hash_request_tokens

__all__ = ["hash_with_next_token"]


class _NextTokenBlockManager(BlockManager):
    """Names a page by its own tokens and the token that follows it."""

    def compute_hashes_for_request(self, ctx: TextContext) -> None:
        hashes = self.req_to_hashes[ctx.request_id]
        start = len(hashes) * self.block_size
        pages = (len(ctx.tokens) - 1 - start) // self.block_size
        if pages < 1:
            return
        end = start + pages * self.block_size
        first_token = int(ctx.tokens[0])
        hashes.extend(
            hash_request_tokens(
                token_ids=ctx.tokens[start + 1 : end + 1],
                block_size=self.block_size,
                parent_hash=hashes[-1] if hashes else None,
                algo=self.kv_hash_algo,
                seed=self.kv_hash_seed,
                # The window starts at the second token, so the first one is named here.
                salt=f"{first_token}/{ctx.cache_salt or ''}",
            )
        )


def hash_with_next_token(manager: PagedKVCacheManager) -> None:
    """Makes a cached page match only where the token after it matches too.

    Row i of an EAGLE or MTP draft reads token i + 1. A page's last draft entry
    therefore depends on a token of the following page, which MAX's page names
    leave out: two prompts that part at a page's end would share that entry.

    Args:
        manager: a manager that holds no request yet.
    """
    manager._block_manager.__class__ = _NextTokenBlockManager
