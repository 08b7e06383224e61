"""Configuration of a DeepSeek-V3 target that drafts with its own MTP layer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from unispec.pipelines.drafts.mtp.config import UnifiedMtpConfig
from unispec.pipelines.targets.deepseek import DEEPSEEK_V3
from unispec.pipelines.unified.target import TargetFamily

__all__ = ["UnifiedMTPDeepseekV3Config"]


@dataclass(kw_only=True)
class UnifiedMTPDeepseekV3Config(UnifiedMtpConfig):
    """The target's stack, and how its MTP layer drafts."""

    family: ClassVar[TargetFamily] = DEEPSEEK_V3
