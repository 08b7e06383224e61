"""A checkpoint's layer in the layout that the layers of `kernels` have their weights in."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

import numpy as np

from unispec.checkpoints import Tensor

from .config import DeepseekV3Config

__all__ = ["in_layout"]

_PROJECTIONS: Final = ("gate_proj", "up_proj", "down_proj")


def in_layout(
    state: Mapping[str, Tensor], config: DeepseekV3Config, layer: int, prefix: str
) -> dict[str, Tensor]:
    """Brings one layer into the layout of `DecoderLayer`; all else stays as it is.

    Args:
        config: the shape of the model, and where it runs.
        layer: from 0; the MTP layer comes after the last one.
    """
    if config.on_gpus:
        return _with_neighbours(state, config, prefix)
    return _stacked(state, config, layer, prefix)


def _stacked(
    state: Mapping[str, Tensor], config: DeepseekV3Config, layer: int, prefix: str
) -> dict[str, Tensor]:
    """`kv_b_proj` taken apart into what makes keys and what makes values; experts as one."""
    state = dict(state)
    heads, rank = config.num_attention_heads, config.kv_lora_rank
    both = state.pop(f"{prefix}.self_attn.kv_b_proj.weight").reshape(heads, -1, rank)
    keys, values = np.split(both, [config.qk_nope_head_dim], axis=1)
    state[f"{prefix}.self_attn.k_b_proj"] = np.ascontiguousarray(keys)
    state[f"{prefix}.self_attn.v_b_proj"] = np.ascontiguousarray(values.transpose(0, 2, 1))
    if config.has_experts(layer):
        mlp = f"{prefix}.mlp.experts"
        gate, up, down = (
            np.stack(
                [
                    state.pop(f"{mlp}.{expert}.{name}.weight")
                    for expert in range(config.n_routed_experts)
                ]
            )
            for name in _PROJECTIONS
        )
        state[f"{mlp}.gate_up_proj"] = np.concatenate([gate, up], axis=1)
        state[f"{mlp}.down_proj"] = down
    return state


def _with_neighbours(
    state: Mapping[str, Tensor], config: DeepseekV3Config, prefix: str
) -> dict[str, Tensor]:
    """Columns that rotate together side by side, as MAX's kernel for GPUs takes them."""
    state = dict(state)
    if config.rope_interleave:
        return state
    width = config.qk_rope_head_dim
    order = np.arange(width).reshape(2, -1).T.reshape(-1)  # 0, P/2, 1, P/2 + 1, ...
    query = "q_proj" if config.q_lora_rank is None else "q_b_proj"
    rows_of_head = {query: config.query_head_dim, "kv_a_proj_with_mqa": config.cache_width}
    for projection, rows in rows_of_head.items():
        name = f"{prefix}.self_attn.{projection}.weight"
        matrix = state[name]
        heads = matrix.reshape(-1, rows, matrix.shape[1])
        plain, rotated = np.split(heads, [rows - width], axis=1)
        state[name] = np.concatenate([plain, rotated[:, order]], axis=1).reshape(matrix.shape)
    return state
