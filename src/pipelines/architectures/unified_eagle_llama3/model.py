"""The pipeline model: Llama 3 target and EAGLE draft in one compiled graph."""

from __future__ import annotations

from typing import Any, ClassVar

from unispec.pipelines.drafts.eagle.method import EAGLE
from unispec.pipelines.runtime.inputs import StepModelInputs
from unispec.pipelines.targets.llama import LLAMA
from unispec.pipelines.unified.method import DraftMethod
from unispec.pipelines.unified.model import UnifiedModel
from unispec.pipelines.unified.target import TargetFamily

from .config import UnifiedEagleLlama3Config
from .inputs import UnifiedEagleLlama3Inputs

__all__ = ["UnifiedEagleLlama3Model"]


class UnifiedEagleLlama3Model(UnifiedModel):
    """Llama 3 target and EAGLE draft in one compiled graph; see `UnifiedModel`."""

    family: ClassVar[TargetFamily] = LLAMA
    method: ClassVar[DraftMethod | None] = EAGLE
    model_config_cls: ClassVar[type[Any]] = UnifiedEagleLlama3Config
    """The class that reads `PipelineConfig`."""
    inputs_cls: ClassVar[type[StepModelInputs]] = UnifiedEagleLlama3Inputs
