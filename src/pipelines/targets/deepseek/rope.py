"""Rotary embeddings of DeepSeek-V3: plain, or scaled as YaRN does (arXiv 2309.00071)."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from max.nn.rotary_embedding import RotaryEmbedding

from unispec.pipelines.layers.rope import Rope, read_rope
from unispec.pipelines.layers.rope import rotary_embedding as table

if TYPE_CHECKING:
    from .config import DeepseekV3Config

__all__ = ["read_deepseek_rope", "rotary_embedding", "softmax_scale"]


def read_deepseek_rope(hf: Any, source: str) -> Rope:
    """Theta and scaling, plain or YaRN's.

    Raises:
        InputError: another rope type, or a parameter that is missing or out of range.
    """
    return read_rope(hf, hf.qk_rope_head_dim, source, types=("default", "yarn"))


def softmax_scale(head_dim: int, rope: Rope) -> float:
    """1 / sqrt(head_dim), times the square of YaRN's factor for `mscale_all_dim`.

    As DeepSeek-V3's own code and transformers have it.

    Args:
        head_dim: width of a query head, rotated part included.
    """
    scale = 1.0 / math.sqrt(head_dim)
    if rope.yarn is None or not rope.yarn.mscale_all_dim:
        return scale
    return scale * _growth(rope.yarn.scaling_factor, rope.yarn.mscale_all_dim) ** 2


def rotary_embedding(config: DeepseekV3Config, *, scaled: bool = True) -> RotaryEmbedding:
    """The rotary table for every position that a row at its limit can touch.

    Args:
        scaled: whether as YaRN says, where the stack has it.
    """
    rope = Rope(config.rope_theta, yarn=config.rope_scaling if scaled else None)
    return table(
        rope,
        head_dim=config.qk_rope_head_dim,
        max_seq_len=config.max_seq_len,
        interleaved=config.rope_interleave,
    )


def _growth(factor: float, scale: float) -> float:
    """YaRN's 0.1 m ln(s) + 1 for an extension of s."""
    return 0.1 * scale * math.log(factor) + 1.0 if factor > 1 else 1.0
