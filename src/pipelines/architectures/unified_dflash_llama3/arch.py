"""Registration with MAX: what it renames a Llama target with a DFlash draft to."""

from __future__ import annotations

from unispec.pipelines.architectures.registration import text_architecture
from unispec.pipelines.drafts.dflash.registration import checkpoint_draft_width
from unispec.pipelines.drafts.unserved import UnservedPipeline

from .config import UnifiedDflashLlama3Config
from .model import UnifiedDflashLlama3Model

__all__ = ["ARCHITECTURE"]


ARCHITECTURE = text_architecture(
    "UnifiedDflashLlama3ForCausalLM",
    UnifiedDflashLlama3Model,
    UnifiedDflashLlama3Config,
    example_repo_id="HuggingFaceTB/SmolLM2-135M-Instruct",
    checkpoint_draft_width=checkpoint_draft_width,
    pipeline_cls=UnservedPipeline,
)
"""The entry of MAX's registry; MAX learns K from the checkpoint."""
