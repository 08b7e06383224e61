"""Configuration of a Llama 3 target with a DFlash draft."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from unispec.pipelines.drafts.dflash.unified import UnifiedDflashConfig
from unispec.pipelines.targets.llama import LLAMA
from unispec.pipelines.targets.llama.config import Llama3Config
from unispec.pipelines.unified.target import TargetFamily

__all__ = ["UnifiedDflashLlama3Config"]


@dataclass(kw_only=True)
class UnifiedDflashLlama3Config(UnifiedDflashConfig):
    """Target and draft stacks and how they work together."""

    family: ClassVar[TargetFamily] = LLAMA

    target: Llama3Config
    """The target's stack."""
