"""The unified graph: Kimi K2.5 target, acceptance and DFlash draft in one execution."""

from __future__ import annotations

from max.graph import BufferType, TensorType
from max.nn.kv_cache import KVCacheParams

from unispec.pipelines.drafts.dflash.method import DFLASH
from unispec.pipelines.targets.kimi import KIMI_K25
from unispec.pipelines.unified.config import both_caches
from unispec.pipelines.unified.graph import UnifiedStep

from .config import UnifiedDflashKimiK25Config
from .inputs import UnifiedDflashKimiK25Inputs

__all__ = ["UnifiedDflashKimiK25"]


class UnifiedDflashKimiK25(UnifiedStep):
    """Target and draft; their weights load under `target.` and `draft.`."""

    def __init__(self, config: UnifiedDflashKimiK25Config) -> None:
        super().__init__(config, KIMI_K25, DFLASH, UnifiedDflashKimiK25Inputs)

    def input_types(
        self, kv_params: KVCacheParams, draft_kv_params: KVCacheParams
    ) -> tuple[TensorType | BufferType, ...]:
        """The graph's input types, in the order of `UnifiedDflashKimiK25Inputs.buffers`.

        Args:
            kv_params: the target's cache.
            draft_kv_params: the draft's cache.
        """
        return tuple(self.signature(both_caches(kv_params, draft_kv_params)).types())
