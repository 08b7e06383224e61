"""Registration with MAX: what it renames a Kimi K2.5 target with a DFlash draft to."""

from __future__ import annotations

from unispec.pipelines.architectures.registration import text_architecture
from unispec.pipelines.drafts.dflash.registration import checkpoint_draft_width
from unispec.pipelines.drafts.unserved import UnservedPipeline

from .config import UnifiedDflashKimiK25Config
from .model import UnifiedDflashKimiK25Model

__all__ = ["ARCHITECTURE"]

ARCHITECTURE = text_architecture(
    "UnifiedDflashKimiK25ForCausalLM",
    UnifiedDflashKimiK25Model,
    UnifiedDflashKimiK25Config,
    example_repo_id="moonshotai/Kimi-K2.5",
    checkpoint_draft_width=checkpoint_draft_width,
    pipeline_cls=UnservedPipeline,
)
"""The entry of MAX's registry; MAX learns K from the draft's checkpoint."""
