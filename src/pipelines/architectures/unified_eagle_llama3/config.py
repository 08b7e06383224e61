"""Configuration of a Llama 3 target with an EAGLE draft."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from unispec.pipelines.drafts.eagle.config import UnifiedEagleConfig
from unispec.pipelines.targets.llama import LLAMA
from unispec.pipelines.targets.llama.config import Llama3Config
from unispec.pipelines.unified.target import TargetFamily

__all__ = ["UnifiedEagleLlama3Config"]


@dataclass(kw_only=True)
class UnifiedEagleLlama3Config(UnifiedEagleConfig):
    """Target and draft stacks and how they work together."""

    family: ClassVar[TargetFamily] = LLAMA

    target: Llama3Config
    """The target's stack."""
