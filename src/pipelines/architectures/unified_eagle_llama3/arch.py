"""Registration with MAX: what it renames a Llama target with an EAGLE draft to."""

from __future__ import annotations

from unispec.pipelines.architectures.registration import text_architecture
from unispec.pipelines.drafts.unserved import UnservedPipeline

from .config import UnifiedEagleLlama3Config
from .model import UnifiedEagleLlama3Model

__all__ = ["ARCHITECTURE"]

ARCHITECTURE = text_architecture(
    "UnifiedEagleLlama3ForCausalLM",
    UnifiedEagleLlama3Model,
    UnifiedEagleLlama3Config,
    example_repo_id="HuggingFaceTB/SmolLM2-135M-Instruct",
    pipeline_cls=UnservedPipeline,
)
"""The entry of MAX's registry."""
