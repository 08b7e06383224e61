"""EAGLE speculative decoding for a Llama 3 target, one graph."""

from __future__ import annotations

from .config import UnifiedEagleLlama3Config
from .inputs import PersistentInputBuffers, UnifiedEagleLlama3Inputs
from .model import UnifiedEagleLlama3Model

__all__ = [
    "PersistentInputBuffers",
    "UnifiedEagleLlama3Config",
    "UnifiedEagleLlama3Inputs",
    "UnifiedEagleLlama3Model",
]
