"""The pipeline model: loads both checkpoints and compiles the unified graph."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, ClassVar

from max.dtype import DType
from max.engine import InferenceSession, Model
from max.graph import DeviceRef
from max.nn.kv_cache import KVCacheParams
from max.pipelines.lib import KVCacheConfig, PipelineConfig

from unispec.pipelines.runtime.model import UnifiedModel

from ..eagle.weights import eagle_state_dict
from ..llama3.config import Llama3Config
from ..llama3.weights import llama3_state_dict
from .config import UnifiedEagleLlama3Config
from .graph import UnifiedEagleLlama3, build_graph
from .inputs import UnifiedEagleLlama3Inputs
from .weights import unified_state_dict

__all__ = ["UnifiedEagleLlama3Model"]


class UnifiedEagleLlama3Model(UnifiedModel):
    """Llama 3 target and EAGLE draft in one compiled graph; see `UnifiedModel`."""

    model_config_cls: ClassVar[type[Any]] = UnifiedEagleLlama3Config
    inputs_cls = UnifiedEagleLlama3Inputs
    draft_reads_next_token = True

    @classmethod
    def get_kv_params(
        cls,
        huggingface_config: Any,
        pipeline_config: PipelineConfig,
        devices: list[DeviceRef],
        kv_cache_config: KVCacheConfig,
        cache_dtype: DType,
    ) -> KVCacheParams:
        """The target's cache parameters; `UnifiedEagleLlama3Config` has those of both."""
        return Llama3Config.construct_kv_params(
            huggingface_config, pipeline_config, devices, kv_cache_config, cache_dtype
        )

    def load_model(self, session: InferenceSession) -> Model:
        """Reads both checkpoints, builds the graph and compiles it with the session.

        Raises:
            InputError: a tensor is missing, unknown, of another shape or not finite.
        """
        config: UnifiedEagleLlama3Config = self.arch_config
        draft_model = self.pipeline_config.draft_model
        assert draft_model is not None
        target_tensors, source = self.read_weights(self.pipeline_config.model)
        target = llama3_state_dict(target_tensors, config.target, source=source)
        draft_tensors, source = self.read_weights(draft_model)
        draft = eagle_state_dict(
            draft_tensors, draft_model.huggingface_config, config.target, source=source
        )
        proposed = config.target.vocab_size if draft.d2t is None else len(draft.d2t)
        config = replace(config, draft=replace(config.draft, vocab_size=proposed))
        module = UnifiedEagleLlama3(config, fc_bias=draft.has_fc_bias)
        module.load_state_dict(
            unified_state_dict(target, draft, config.target.dtype), weight_alignment=1
        )
        return self.compile(session, build_graph(config, module), module.state_dict())
