"""Registration with MAX: what it renames a Llama target with a DFlash draft to."""

from __future__ import annotations

from typing import Any

from max.pipelines.speculative import SpeculativeConfig

from ..dflash.config import DflashDraftHFConfig
from ..drafts.unserved import UnservedPipeline
from ..registration import text_architecture
from .config import UnifiedDflashLlama3Config, draft_width
from .model import UnifiedDflashLlama3Model

__all__ = ["ARCHITECTURE"]


def _draft_width(speculative: SpeculativeConfig, target: Any, draft: Any) -> int:
    """K: one less than the checkpoint's block; 0, as asked, where it does not say."""
    block_size = DflashDraftHFConfig.from_huggingface(draft).block_size
    return draft_width(block_size, speculative.num_speculative_tokens) if block_size else 0


ARCHITECTURE = text_architecture(
    "UnifiedDflashLlama3ForCausalLM",
    UnifiedDflashLlama3Model,
    UnifiedDflashLlama3Config,
    example_repo_id="HuggingFaceTB/SmolLM2-135M-Instruct",
    checkpoint_draft_width=_draft_width,
    pipeline_cls=UnservedPipeline,
)
"""The entry of MAX's registry; MAX learns K from the checkpoint."""
