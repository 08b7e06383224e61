"""Parameters of a stack's cache, with room for the drafts that a step verifies."""

from __future__ import annotations

from typing import Any

from max.nn.kv_cache import KVCacheParams
from max.pipelines.lib import KVCacheConfig, PipelineConfig

__all__ = ["cache_params"]


def cache_params(
    kv_cache_config: KVCacheConfig, pipeline_config: PipelineConfig, **shape: Any
) -> KVCacheParams:
    """Parameters of one stack's cache.

    Args:
        shape: what `KVCacheConfig.to_params` takes of layers, heads, dtype and devices.
    """
    speculative = pipeline_config.speculative
    method = speculative.speculative_method if speculative else None
    num_drafts = speculative.num_speculative_tokens or 0 if speculative and method else 0
    return kv_cache_config.to_params(
        speculative_method=method, num_draft_tokens=num_drafts, **shape
    )
