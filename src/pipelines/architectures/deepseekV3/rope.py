"""Rotary embeddings of DeepSeek-V3: plain, or scaled as YaRN does (arXiv 2309.00071)."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, NamedTuple

from max.nn.rotary_embedding import (
    DeepseekYarnRopeScalingParams,
    DeepseekYarnRotaryEmbedding,
    RotaryEmbedding,
)

from unispec.errors import InputError

from ..llama3.checks import positive

if TYPE_CHECKING:
    from .config import DeepseekV3Config

__all__ = ["Rope", "read_rope", "rotary_embedding", "softmax_scale"]


class Rope(NamedTuple):
    """Rotary embeddings as a configuration states them."""

    theta: float
    """Base of the frequencies."""
    yarn: DeepseekYarnRopeScalingParams | None = None
    """YaRN's parameters, if it is that."""


def read_rope(hf: Any, source: str) -> Rope:
    """Theta and scaling; transformers 5 keeps both in `rope_parameters`.

    Args:
        hf: a Hugging Face config.
        source: the file or folder, for the errors.

    Raises:
        InputError: an unknown rope type, or a parameter that is missing or out of range.
    """
    parameters: dict[str, Any] = (
        getattr(hf, "rope_parameters", None) or getattr(hf, "rope_scaling", None) or {}
    )
    stated: Any = parameters.get("rope_theta") or getattr(hf, "rope_theta", 10000.0)
    theta = positive("rope_theta", stated, source)
    kind = parameters.get("rope_type") or parameters.get("type") or "default"
    if kind == "default":
        return Rope(theta)
    if kind != "yarn":
        raise InputError(
            f"rope type {kind!r} of {source} is not supported; use a checkpoint of type 'default'"
            " or 'yarn'"
        )
    if parameters.get("attention_factor") is not None or parameters.get("truncate") is False:
        raise InputError(
            f"attention_factor and truncate of {source}'s rope are not supported; remove them,"
            " DeepSeek-V3 has neither"
        )

    def constant(name: str, default: float | None = None) -> float:
        value = parameters.get(name)
        return positive(name, default if value is None else value, source)

    scales = [parameters.get(name) for name in ("mscale", "mscale_all_dim")]
    if (scales[0] is None) != (scales[1] is None):
        raise InputError(
            f"the rope of {source} has one of mscale and mscale_all_dim; state both or none"
        )
    first = "original_max_position_embeddings"
    return Rope(
        theta,
        DeepseekYarnRopeScalingParams(
            scaling_factor=constant("factor"),
            original_max_position_embeddings=int(constant(first)),
            beta_fast=int(constant("beta_fast", 32)),
            beta_slow=int(constant("beta_slow", 1)),
            # Where neither is stated the table grows as YaRN says and the scores do not.
            mscale=1.0 if scales[0] is None else constant("mscale"),
            mscale_all_dim=0.0 if scales[1] is None else constant("mscale_all_dim"),
        ),
    )


def softmax_scale(head_dim: int, rope: Rope) -> float:
    """1 / sqrt(head_dim), times the square of YaRN's factor for `mscale_all_dim`.

    As DeepSeek-V3's own code and transformers have it.

    Args:
        head_dim: width of a query head, rotated part included.
        rope: the stack's.
    """
    scale = 1.0 / math.sqrt(head_dim)
    if rope.yarn is None or not rope.yarn.mscale_all_dim:
        return scale
    return scale * _growth(rope.yarn.scaling_factor, rope.yarn.mscale_all_dim) ** 2


def rotary_embedding(config: DeepseekV3Config) -> RotaryEmbedding:
    """The rotary table for every position that a row at its limit can touch.

    Args:
        config: the stack; its `rope_positions` are the rows of the table.
    """
    width = config.qk_rope_head_dim
    if config.rope_scaling is None:
        # MAX's table has two rows for each position of this length.
        return RotaryEmbedding(
            dim=width,
            n_heads=1,
            theta=config.rope_theta,
            max_seq_len=config.rope_positions // 2,
            interleaved=config.rope_interleave,
        )
    return DeepseekYarnRotaryEmbedding(
        dim=width,
        n_heads=1,
        theta=config.rope_theta,
        max_seq_len=config.rope_positions,
        interleaved=config.rope_interleave,
        scaling_params=config.rope_scaling,
    )


def _growth(factor: float, scale: float) -> float:
    """YaRN's 0.1 m ln(s) + 1 for an extension of s."""
    return 0.1 * scale * math.log(factor) + 1.0 if factor > 1 else 1.0
