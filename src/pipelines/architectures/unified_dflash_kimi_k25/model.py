"""The pipeline model: Kimi K2.5 target and DFlash draft in one compiled graph."""

from __future__ import annotations

from typing import Any, ClassVar

from unispec.pipelines.drafts.dflash.method import DFLASH
from unispec.pipelines.runtime.inputs import StepModelInputs
from unispec.pipelines.targets.kimi import KIMI_K25
from unispec.pipelines.targets.kimi.model import KimiK2_5Model
from unispec.pipelines.unified.method import DraftMethod
from unispec.pipelines.unified.target import TargetFamily

from .config import UnifiedDflashKimiK25Config
from .inputs import UnifiedDflashKimiK25Inputs

__all__ = ["UnifiedDflashKimiK25Model"]


class UnifiedDflashKimiK25Model(KimiK2_5Model):
    """Kimi K2.5 target and DFlash draft in one compiled graph; see `UnifiedModel`.

    Args:
        *args: as `UnifiedModel` takes them.
        **kwargs: likewise.
    """

    family: ClassVar[TargetFamily] = KIMI_K25
    method: ClassVar[DraftMethod | None] = DFLASH
    model_config_cls: ClassVar[type[Any]] = UnifiedDflashKimiK25Config
    """The class that reads `PipelineConfig`."""
    inputs_cls: ClassVar[type[StepModelInputs]] = UnifiedDflashKimiK25Inputs

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
