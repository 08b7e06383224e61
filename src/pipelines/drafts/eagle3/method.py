"""EAGLE-3 as a draft method."""

from __future__ import annotations

from collections.abc import Mapping

from unispec.checkpoints import Weight
from unispec.checkpoints.tied_head import EMBEDDING
from unispec.pipelines.drafts.copies import check_copies
from unispec.pipelines.speculative.sequential import sequential_step
from unispec.pipelines.unified.checkpoint import Checkpoint
from unispec.pipelines.unified.method import DraftMethod, DraftWeights

from .config import UnifiedEagle3Config
from .draft import Eagle3Draft
from .weights import eagle3_weights

__all__ = ["EAGLE3"]


def _state(
    draft: Checkpoint, config: UnifiedEagle3Config, target: Mapping[str, Weight]
) -> DraftWeights:
    # A head of its own was trained away from the target's.
    check_copies(draft.tensors, target, names=(EMBEDDING,), source=draft.source)
    return eagle3_weights(
        draft.tensors,
        draft.config,
        config.target,
        target,
        num_taps=len(config.target_layer_ids),
        norms=config.norms_before_fc,
        source=draft.source,
    )


EAGLE3 = DraftMethod(
    config=UnifiedEagle3Config,
    state=_state,
    build=Eagle3Draft,
    step=sequential_step,
    reads_next_token=True,
)
"""EAGLE-3 as a chain."""
