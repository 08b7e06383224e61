"""Registration with MAX: what replaces a DeepSeek-V3 target whose MTP layer drafts."""

from __future__ import annotations

from max.pipelines.lib import Speculator

from unispec.pipelines.targets.deepseek.arch import ARCHITECTURE as TARGET

from .config import UnifiedMTPDeepseekV3Config
from .model import UnifiedMTPDeepseekV3Model

__all__ = ["ARCHITECTURE"]

ARCHITECTURE = Speculator(
    name="UnifiedMTPDeepseekV3ForCausalLM",
    base=TARGET,
    draft_arch=None,
    method="mtp",
    pipeline_model=UnifiedMTPDeepseekV3Model,
    config=UnifiedMTPDeepseekV3Config,
)
"""The entry of MAX's registry."""
