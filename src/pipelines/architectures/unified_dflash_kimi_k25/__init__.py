"""DFlash speculative decoding for a Kimi K2.5 target, one graph."""

from __future__ import annotations

from .config import DFlashKimiK25DraftConfig, UnifiedDflashKimiK25Config
from .graph import UnifiedDflashKimiK25
from .inputs import PersistentInputBuffers, UnifiedDflashKimiK25Inputs
from .model import UnifiedDflashKimiK25Model

__all__ = [
    "DFlashKimiK25DraftConfig",
    "PersistentInputBuffers",
    "UnifiedDflashKimiK25",
    "UnifiedDflashKimiK25Config",
    "UnifiedDflashKimiK25Inputs",
    "UnifiedDflashKimiK25Model",
]
