"""Registration with MAX: what it renames a Llama target with an EAGLE draft to."""

from __future__ import annotations

from ..drafts.unserved import UnservedPipeline
from ..llama3.registration import llama3_architecture
from .config import UnifiedEagleLlama3Config
from .model import UnifiedEagleLlama3Model

__all__ = ["ARCHITECTURE"]

ARCHITECTURE = llama3_architecture(
    "UnifiedEagleLlama3ForCausalLM",
    UnifiedEagleLlama3Model,
    UnifiedEagleLlama3Config,
    pipeline_cls=UnservedPipeline,
)
"""The entry of MAX's registry."""
