"""Multi-token prediction as a draft method."""

from __future__ import annotations

from collections.abc import Mapping

from unispec.checkpoints import Weight
from unispec.pipelines.speculative.sequential import sequential_step
from unispec.pipelines.unified.checkpoint import Checkpoint
from unispec.pipelines.unified.method import DraftMethod, DraftWeights

from .config import UnifiedMtpConfig
from .draft import MtpDraft
from .weights import mtp_state_dict

__all__ = ["MTP"]


def _state(
    target: Checkpoint, config: UnifiedMtpConfig, weights: Mapping[str, Weight]
) -> DraftWeights:
    return DraftWeights(mtp_state_dict(target.tensors, config.target, source=target.source))


MTP = DraftMethod(
    config=UnifiedMtpConfig,
    state=_state,
    build=MtpDraft,
    step=sequential_step,
    reads_next_token=True,
)
"""DeepSeek-V3's layer of multi-token prediction, which is part of the target's checkpoint."""
