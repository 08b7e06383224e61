"""How much memory a served pair needs beside its cache."""

from __future__ import annotations

from typing import Any, Final

from max.pipelines.kv_cache import PagedMemoryPlanner
from max.pipelines.lib import PipelineConfig

from unispec.pipelines.runtime.deferred import LOG_ROWS_PER_REQUEST
from unispec.pipelines.runtime.weights import weight_bytes
from unispec.pipelines.speculative.deferred import FeatureType

__all__ = ["ServedMemoryPlanner"]

_INT32_BYTES: Final = 4
_FLOAT32_BYTES: Final = 4


class ServedMemoryPlanner(PagedMemoryPlanner):
    """Counts what MAX's own planner leaves out: the draft, and the inputs of sampling."""

    def estimate_weights_size(self, pipeline_config: PipelineConfig) -> int:
        """What `weight_bytes` says."""
        return weight_bytes(pipeline_config, self._config)

    def estimate_activation_memory(
        self, pipeline_config: PipelineConfig, huggingface_config: Any
    ) -> int:
        """Bytes of the sampling inputs that are as wide as the vocabulary, and of the feature log.

        With B rows and V tokens the inputs are token counts and biases `[B, V]` and grammar masks
        `[B, K + 1, V / 32]`, and of sampled drafts the distributions `[B, K, V]`, one going in
        and one coming out, on a GPU also that of the step that is enqueued ahead.
        """
        params = self._config.get_kv_params()
        vocab, width = int(huggingface_config.get_text_config().vocab_size), params.num_draft_tokens
        speculative = pipeline_config.speculative
        sampled = speculative is not None and speculative.draft_proposal == "sampled"
        row = (_INT32_BYTES + _FLOAT32_BYTES) * vocab
        row += _INT32_BYTES * (width + 1) * -(-vocab // 32)
        kept = 2 if params.devices[0].is_cpu() else 3
        row += kept * _FLOAT32_BYTES * width * vocab if sampled else 0
        features: FeatureType | None = getattr(self._config, "features", None)
        if features is not None:
            row += LOG_ROWS_PER_REQUEST * features.width * features.dtype.size_in_bytes
        rows = (pipeline_config.runtime.max_batch_size or 1) * params.data_parallel_degree
        return int(rows * row)
