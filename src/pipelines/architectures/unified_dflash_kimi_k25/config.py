"""Configuration of a Kimi K2.5 target with a DFlash draft."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from unispec.pipelines.drafts.dflash.unified import DflashStackConfig, UnifiedDflashConfig
from unispec.pipelines.targets.kimi import KIMI_K25
from unispec.pipelines.targets.kimi.config import KimiK2_5Config
from unispec.pipelines.targets.llama.stack_config import StackConfig
from unispec.pipelines.unified.target import TargetFamily

__all__ = ["DFlashKimiK25DraftConfig", "UnifiedDflashKimiK25Config"]


@dataclass(kw_only=True)
class DFlashKimiK25DraftConfig(DflashStackConfig):
    """The draft's stack: ordinary attention, rotated in halves, scaled as YaRN does."""


@dataclass(kw_only=True)
class UnifiedDflashKimiK25Config(UnifiedDflashConfig):
    """Target and draft stacks and how they work together."""

    family: ClassVar[TargetFamily] = KIMI_K25
    draft_stack: ClassVar[type[StackConfig]] = DFlashKimiK25DraftConfig
    """Reads the draft's stack."""

    target: KimiK2_5Config
    """The target's stack and vision tower."""
    draft: DFlashKimiK25DraftConfig
    """The draft's stack, on the target's device and in its dtype."""
