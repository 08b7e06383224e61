"""DeepSeek-V3 multi-token prediction speculative decoding, one graph."""

from __future__ import annotations

from .config import UnifiedMTPDeepseekV3Config
from .inputs import PersistentInputBuffers, UnifiedMTPDeepseekV3Inputs
from .model import UnifiedMTPDeepseekV3Model

__all__ = [
    "PersistentInputBuffers",
    "UnifiedMTPDeepseekV3Config",
    "UnifiedMTPDeepseekV3Inputs",
    "UnifiedMTPDeepseekV3Model",
]
