"""Registration with MAX: a Mistral, alone or with a draft, which is a Llama by another name."""

from __future__ import annotations

from typing import Any

from max.pipelines.speculative import SpeculativeConfig

from unispec.pipelines.architectures.registration import text_architecture
from unispec.pipelines.drafts.dflash.registration import checkpoint_draft_width
from unispec.pipelines.drafts.unserved import UnservedPipeline

from .stack_config import StackConfig
from .target_only import Llama3TargetModel

__all__ = ["MISTRAL"]


def _draft_width(speculative: SpeculativeConfig, target: Any, draft: Any) -> int:
    """K of a DFlash draft's checkpoint; 0, as asked, for another or none."""
    return checkpoint_draft_width(speculative, target, draft) if speculative.is_dflash() else 0


MISTRAL = text_architecture(
    "MistralForCausalLM",
    Llama3TargetModel,
    StackConfig,
    example_repo_id="mistralai/Mistral-7B-Instruct-v0.3",
    checkpoint_draft_width=_draft_width,
    pipeline_cls=UnservedPipeline,
)
"""The entry of MAX's registry, for engines of this package; MAX does not rename it for a draft."""
