"""What MAX asks of a DFlash draft before its model is built."""

from __future__ import annotations

from typing import Any

from max.pipelines.speculative import SpeculativeConfig

from .config import DflashDraftHFConfig
from .unified import draft_width

__all__ = ["checkpoint_draft_width"]


def checkpoint_draft_width(speculative: SpeculativeConfig, target: Any, draft: Any) -> int:
    """K: one less than the checkpoint's block; 0, as asked, where it does not say.

    Args:
        speculative: for K that was asked for, if any.
        target: the target's Hugging Face config.
        draft: the draft's.
    """
    block_size = DflashDraftHFConfig.from_huggingface(draft).block_size
    return draft_width(block_size, speculative.num_speculative_tokens) if block_size else 0
