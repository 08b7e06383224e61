"""Rotary embeddings: what a Hugging Face config says of them, and the table in a graph."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt
from max.dtype import DType
from max.graph import DeviceRef, TensorValue, ops
from max.nn.rotary_embedding import (
    DeepseekYarnRopeScalingParams,
    DeepseekYarnRotaryEmbedding,
    Llama3RopeScalingParams,
    Llama3RotaryEmbedding,
    LongRoPEScalingParams,
    RotaryEmbedding,
)

from unispec.errors import InputError
from unispec.methods import LARGEST_DRAFT_TOKENS

from .fields import positive

__all__ = [
    "LongRotaryEmbedding",
    "Rope",
    "RopeType",
    "num_positions",
    "read_rope",
    "rotary_embedding",
]

RopeType = Literal["default", "llama3", "longrope", "yarn"]
"""What config.json may call the way in which rotary frequencies are scaled."""


class Rope(NamedTuple):
    """Rotary embeddings as a configuration states them."""

    theta: float
    """Base of the frequencies."""
    llama3: Llama3RopeScalingParams | None = None
    """Llama 3.1's scaling, if it is that."""
    long: LongRoPEScalingParams | None = None
    """LongRoPE's factors, if it is that."""
    yarn: DeepseekYarnRopeScalingParams | None = None
    """YaRN's parameters, if it is that."""


def read_rope(hf: Any, head_dim: int, source: str, *, types: Sequence[RopeType]) -> Rope:
    """Theta and scaling; transformers 5 keeps both in `rope_parameters`.

    Raises:
        InputError: another rope type, a parameter that is missing or out of range, or a
            rotation of a part of the head only.
    """
    parameters: dict[str, Any] = (
        getattr(hf, "rope_parameters", None) or getattr(hf, "rope_scaling", None) or {}
    )
    if any(isinstance(value, Mapping) for value in parameters.values()):
        raise InputError(
            f"the rope parameters of {source} differ by layer type ({', '.join(parameters)}), which"
            " is not supported; use a checkpoint with the same for all layers"
        )
    base: Any = parameters.get("rope_theta")
    if base is None:
        base = getattr(hf, "rope_theta", 10000.0)
    theta = positive("rope_theta", base, source)
    part = parameters.get("partial_rotary_factor", getattr(hf, "partial_rotary_factor", None))
    if part not in (None, 1.0):
        raise InputError(
            f"partial_rotary_factor {part!r} of {source} is not supported; use a checkpoint that"
            " rotates whole heads"
        )
    kind = parameters.get("rope_type") or parameters.get("type") or "default"
    if kind not in types:
        raise InputError(
            f"rope type {kind!r} of {source} is not supported; use a checkpoint of type"
            f" {' or '.join(map(repr, types))}"
        )
    if kind == "default":
        return Rope(theta)
    if kind == "llama3":
        return Rope(theta, llama3=_llama3(parameters, source))
    if kind == "longrope":
        return Rope(theta, long=_long(hf, parameters, head_dim, source))
    return Rope(theta, yarn=_yarn(parameters, source))


def num_positions(max_seq_len: int) -> int:
    """Rows of a rotary table: every position that drafts of a sequence at its limit can touch.

    A power of two, so that another `max_seq_len` or K seldom is another graph to compile.
    """
    touched = max_seq_len + 2 * (max(LARGEST_DRAFT_TOKENS.values()) + 1)
    return max(8192, 1 << (touched - 1).bit_length())


def rotary_embedding(
    rope: Rope, *, head_dim: int, max_seq_len: int, interleaved: bool
) -> RotaryEmbedding:
    """The rotary table, of `num_positions` rows.

    Args:
        head_dim: columns that are rotated in a head.
        max_seq_len: longest sequence in tokens.
        interleaved: whether the two columns that rotate together are neighbours; else they are
            half a head apart.
    """
    positions = num_positions(max_seq_len)
    shape: dict[str, Any] = {
        "dim": head_dim,
        "n_heads": 1,
        "theta": rope.theta,
        "interleaved": interleaved,
    }
    if rope.long is not None:
        is_long = max_seq_len > rope.long.original_max_position
        return LongRotaryEmbedding(rope.long, is_long=is_long, max_seq_len=positions, **shape)
    if rope.yarn is not None:
        return DeepseekYarnRotaryEmbedding(max_seq_len=positions, scaling_params=rope.yarn, **shape)
    # MAX's table has two rows for each position of this length.
    return Llama3RotaryEmbedding(max_seq_len=positions // 2, scaling_params=rope.llama3, **shape)


class LongRotaryEmbedding(RotaryEmbedding):
    """LongRoPE (arXiv 2402.13753) as Phi-3 has it: every frequency has a divisor of its own.

    Phi-3 has one set of divisors for sequences within its first context and one for longer
    ones, and rotates all tokens of a sequence alike. A cached key cannot be rotated anew when
    its sequence grows, so the longest sequence decides for all: with the divisors for long
    ones, if a sequence may become long.

    Args:
        params: the divisors, and the lengths of both contexts in tokens.
        is_long: whether a sequence may outgrow the first context.
        shape: what `RotaryEmbedding` takes.
    """

    def __init__(self, params: LongRoPEScalingParams, *, is_long: bool, **shape: Any) -> None:
        super().__init__(**shape)
        self.params = params
        self.is_long = is_long

    def frequencies(self) -> npt.NDArray[np.float32]:
        """Radians a position turns each pair by, float32 `[head_dim / 2]`."""
        divisors = self.params.long_factor if self.is_long else self.params.short_factor
        exponents = np.arange(0, self.head_dim, 2) / self.head_dim
        return (1.0 / (np.array(divisors) * self.theta**exponents)).astype(np.float32)

    def magnitude(self) -> float:
        """By how much queries and keys grow: sqrt(1 + ln(s) / ln(L)).

        s is the extension of the first context L; section 3.3 of the paper, as Phi-3 has it.
        """
        first = self.params.original_max_position
        extension = self.params.max_position_embeddings / first
        return math.sqrt(1 + math.log(extension) / math.log(first)) if extension > 1 else 1.0

    def freqs_cis_base(self) -> TensorValue:
        """Cosine and sine of every position and pair, float32 `[positions, head_dim / 2, 2]`."""
        cpu = DeviceRef.CPU()
        positions = ops.range(0, self.max_seq_len, 1, dtype=DType.float32, device=cpu)
        angles = ops.outer(positions, ops.constant(self.frequencies(), DType.float32, device=cpu))
        return ops.stack([ops.cos(angles), ops.sin(angles)], axis=-1) * self.magnitude()


def _llama3(parameters: dict[str, Any], source: str) -> Llama3RopeScalingParams:
    values = {
        name: positive(name, parameters.get(name), source)
        for name in (
            "factor",
            "low_freq_factor",
            "high_freq_factor",
            "original_max_position_embeddings",
        )
    }
    return Llama3RopeScalingParams(
        factor=values["factor"],
        low_freq_factor=values["low_freq_factor"],
        high_freq_factor=values["high_freq_factor"],
        orig_max_position=int(values["original_max_position_embeddings"]),
    )


def _long(hf: Any, parameters: dict[str, Any], head_dim: int, source: str) -> LongRoPEScalingParams:
    name = "original_max_position_embeddings"
    first = int(positive(name, parameters.get(name) or getattr(hf, name, None), source))
    reach = parameters.get("factor")
    params = LongRoPEScalingParams(
        short_factor=_divisors("short_factor", parameters, head_dim, source),
        long_factor=_divisors("long_factor", parameters, head_dim, source),
        original_max_position=first,
        max_position_embeddings=round(positive("factor", reach, source) * first)
        if reach is not None
        else hf.max_position_embeddings,
    )
    if parameters.get("attention_factor") is not None:
        raise InputError(
            f"attention_factor {parameters['attention_factor']!r} of {source} is not supported;"
            " remove it, it then follows from the lengths of the contexts"
        )
    return params


def _yarn(parameters: Mapping[str, Any], source: str) -> DeepseekYarnRopeScalingParams:
    """YaRN's parameters (arXiv 2309.00071), with DeepSeek's two scales of magnitude."""
    if parameters.get("attention_factor") is not None or parameters.get("truncate") is False:
        raise InputError(
            f"attention_factor and truncate of {source}'s rope are not supported; use a checkpoint"
            " with neither"
        )

    def constant(name: str, default: float | None = None) -> float:
        value = parameters.get(name)
        return positive(name, default if value is None else value, source)

    scales = [parameters.get(name) for name in ("mscale", "mscale_all_dim")]
    if (scales[0] is None) != (scales[1] is None):
        raise InputError(
            f"the rope of {source} has one of mscale and mscale_all_dim; state both or none"
        )
    return DeepseekYarnRopeScalingParams(
        scaling_factor=constant("factor"),
        original_max_position_embeddings=int(constant("original_max_position_embeddings")),
        beta_fast=int(constant("beta_fast", 32)),
        beta_slow=int(constant("beta_slow", 1)),
        # Where neither is stated the table grows as YaRN says and DeepSeek's scores do not.
        mscale=1.0 if scales[0] is None else constant("mscale"),
        mscale_all_dim=0.0 if scales[1] is None else constant("mscale_all_dim"),
    )


def _divisors(name: str, parameters: dict[str, Any], head_dim: int, source: str) -> list[float]:
    divisors = parameters.get(name)
    if not isinstance(divisors, list) or len(divisors) != head_dim // 2:
        raise InputError(
            f"{name} of {source} is no list of {head_dim // 2} numbers, one for each pair of a"
            " head; correct its config.json"
        )
    return [positive(name, divisor, source) for divisor in divisors]
