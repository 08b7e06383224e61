"""EAGLE as a draft method."""

from __future__ import annotations

from collections.abc import Mapping

from unispec.checkpoints import Weight
from unispec.pipelines.drafts.copies import check_copies
from unispec.pipelines.drafts.eagle3.method import EAGLE3
from unispec.pipelines.drafts.weights import draft_weights
from unispec.pipelines.speculative.sequential import sequential_step
from unispec.pipelines.unified.checkpoint import Checkpoint
from unispec.pipelines.unified.method import DraftMethod, DraftWeights

from .config import UnifiedEagleConfig
from .draft import EagleDraft
from .weights import eagle_state_dict

__all__ = ["EAGLE"]


def _state(
    draft: Checkpoint, config: UnifiedEagleConfig, target: Mapping[str, Weight]
) -> DraftWeights:
    check_copies(draft.tensors, target, source=draft.source)
    own = eagle_state_dict(draft.tensors, draft.config, config.target, source=draft.source)
    return draft_weights(own, target)


EAGLE = DraftMethod(
    config=UnifiedEagleConfig,
    state=_state,
    build=EagleDraft,
    step=sequential_step,
    reads_next_token=True,
    later=(EAGLE3,),
)
"""EAGLE-1 and EAGLE-2 as a chain."""
