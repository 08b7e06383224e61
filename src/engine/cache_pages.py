"""How many pages the caches of an engine have."""

from __future__ import annotations

from typing import Final

from max.nn.kv_cache import KVCacheParamInterface

from unispec.kv_cache.manager import pages_per_row

from .config import EngineConfig

__all__ = ["count_pages"]

_CACHE_BYTES: Final = 4 << 30


def count_pages(config: EngineConfig, params: KVCacheParamInterface, max_length: int) -> int:
    """Cache pages in all: those asked for, or full rows for the whole batch in 4 GiB at most.

    Args:
        params: the target's cache, or the tree of both.
        max_length: longest sequence, prompt and output, in tokens.
    """
    if config.kv_cache_pages is not None:
        return config.kv_cache_pages
    affordable = _CACHE_BYTES // int(params.bytes_per_block)
    return max(1, min(pages_per_row(params, max_length) * config.max_batch_size, affordable))
