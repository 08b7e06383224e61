"""DFlash speculative decoding for a Llama 3 target, one graph."""

from __future__ import annotations

from unispec.pipelines.drafts.dflash.config import DflashDraftHFConfig

from .config import UnifiedDflashLlama3Config
from .inputs import PersistentInputBuffers, UnifiedDflashLlama3Inputs
from .model import UnifiedDflashLlama3Model

__all__ = [
    "DflashDraftHFConfig",
    "PersistentInputBuffers",
    "UnifiedDflashLlama3Config",
    "UnifiedDflashLlama3Inputs",
    "UnifiedDflashLlama3Model",
]
