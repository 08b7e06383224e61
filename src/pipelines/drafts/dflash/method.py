"""DFlash as a draft method."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from unispec.checkpoints import Weight
from unispec.pipelines.drafts.copies import check_copies
from unispec.pipelines.drafts.weights import draft_weights
from unispec.pipelines.speculative.block import block_step
from unispec.pipelines.unified.checkpoint import Checkpoint
from unispec.pipelines.unified.method import DraftMethod, DraftWeights

from .config import DflashDraftHFConfig, complete_draft_config
from .draft import DflashDraft
from .unified import UnifiedDflashConfig
from .weights import dflash_state_dict

__all__ = ["DFLASH"]


def _state(
    draft: Checkpoint, config: UnifiedDflashConfig, target: Mapping[str, Weight]
) -> DraftWeights:
    check_copies(draft.tensors, target, source=draft.source)
    own = dflash_state_dict(
        draft.tensors,
        draft.config,
        config.target,
        num_taps=len(config.target_layer_ids),
        source=draft.source,
    )
    return draft_weights(own, target)


def _width(draft: Any) -> int | None:
    """One less than the block, where the checkpoint says how large that is."""
    size = DflashDraftHFConfig.from_huggingface(draft).block_size
    return size - 1 if size else None


DFLASH = DraftMethod(
    config=UnifiedDflashConfig,
    state=_state,
    build=DflashDraft,
    step=block_step,
    reads_next_token=False,
    checkpoint_width=_width,
    prepare=complete_draft_config,
)
"""DFlash: a block of tokens in one pass over the target's features."""
