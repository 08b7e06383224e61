"""The pipeline model: Llama 3 target and DFlash draft in one compiled graph."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

from max.driver import Device
from max.engine import InferenceSession
from max.graph.weights import Weights, WeightsAdapter
from max.nn.transformer import ReturnHiddenStates, ReturnLogits
from max.pipelines.lib import KVCacheConfig, MemoryPlan, PipelineConfig

from unispec.encodings import WeightEncodings
from unispec.pipelines.drafts.dflash.method import DFLASH
from unispec.pipelines.runtime.inputs import StepModelInputs
from unispec.pipelines.targets.llama import LLAMA
from unispec.pipelines.unified.method import DraftMethod
from unispec.pipelines.unified.model import UnifiedModel
from unispec.pipelines.unified.target import TargetFamily

from .config import UnifiedDflashLlama3Config
from .inputs import UnifiedDflashLlama3Inputs

__all__ = ["UnifiedDflashLlama3Model"]


class UnifiedDflashLlama3Model(UnifiedModel):
    """Llama 3 target and DFlash draft in one compiled graph; see `UnifiedModel`."""

    family: ClassVar[TargetFamily] = LLAMA
    method: ClassVar[DraftMethod | None] = DFLASH
    model_config_cls: ClassVar[type[Any]] = UnifiedDflashLlama3Config
    """The class that reads `PipelineConfig`."""
    inputs_cls: ClassVar[type[StepModelInputs]] = UnifiedDflashLlama3Inputs

    def __init__(
        self,
        pipeline_config: PipelineConfig,
        session: InferenceSession,
        devices: list[Device],
        kv_cache_config: KVCacheConfig,
        weights: Weights,
        adapter: WeightsAdapter | None = None,
        return_logits: ReturnLogits = ReturnLogits.LAST_TOKEN,
        return_hidden_states: ReturnHiddenStates = ReturnHiddenStates.NONE,
        max_batch_size: int = 1,
        *,
        memory_plan: MemoryPlan | None = None,
        encodings: WeightEncodings | None = None,
        compiled: Path | None = None,
        compile_to: Path | None = None,
    ) -> None:
        super().__init__(
            pipeline_config,
            session,
            devices,
            kv_cache_config,
            weights,
            adapter,
            return_logits,
            return_hidden_states,
            memory_plan=memory_plan,
            max_batch_size=max_batch_size,
            encodings=encodings,
            compiled=compiled,
            compile_to=compile_to,
        )
