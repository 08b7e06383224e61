"""Multi-token prediction as a draft method."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from unispec.checkpoints import Tensor
from unispec.pipelines.speculative.sequential import sequential_step
from unispec.pipelines.unified.checkpoint import Checkpoint
from unispec.pipelines.unified.method import DraftMethod, DraftWeights

from .config import UnifiedMtpConfig
from .draft import MtpDraft
from .weights import mtp_state_dict

__all__ = ["MTP"]


def _state(
    target: Checkpoint, config: UnifiedMtpConfig, weights: Mapping[str, Tensor]
) -> DraftWeights:
    return DraftWeights(mtp_state_dict(target.tensors, config.target, source=target.source))


def _build(config: UnifiedMtpConfig, target: Any) -> MtpDraft:
    return MtpDraft(config.target, target)


MTP = DraftMethod(
    name="mtp",
    config=UnifiedMtpConfig,
    state=_state,
    build=_build,
    step=sequential_step,
    reads_next_token=True,
)
"""DeepSeek-V3's layer of multi-token prediction, which is part of the target's checkpoint."""
