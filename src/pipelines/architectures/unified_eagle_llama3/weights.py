"""Weights of the unified graph: both checkpoints under the names `target.` and `draft.`."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from max.dtype import DType
from max.graph.weights import WeightData

from unispec.checkpoints import Tensor
from unispec.checkpoints.cast import cast_weights

from ..eagle.weights import EagleWeights

__all__ = ["unified_state_dict"]


def unified_state_dict(
    target: Mapping[str, Tensor], draft: EagleWeights, dtype: DType
) -> dict[str, Tensor | WeightData]:
    """Joins target and draft.

    A draft with a reduced vocabulary gets those rows of the target's head as a head
    of its own: on a small target the head is most of what a draft step reads.

    Args:
        target: the target's weights by name, see `llama3_state_dict`.
        draft: the draft's weights.
        dtype: of all float weights in the graph.
    """
    state = {f"target.{name}": value for name, value in target.items()}
    state |= {f"draft.{name}": value for name, value in draft.state.items()}
    if draft.d2t is None:
        return cast_weights(state, dtype)
    head = target["lm_head.weight" if "lm_head.weight" in target else "embed_tokens.weight"]
    size = len(draft.d2t)  # N
    target_ids = np.arange(size, dtype=np.int64) + draft.d2t  # [N]
    draft_ids = np.full(len(head), size, dtype=np.int64)  # [V]; N stands for "none"
    draft_ids[target_ids] = np.arange(size, dtype=np.int64)
    state["draft.lm_head.weight"] = head[target_ids]
    return {**cast_weights(state, dtype), "draft.d2t": draft.d2t, "draft.t2d": draft_ids}
