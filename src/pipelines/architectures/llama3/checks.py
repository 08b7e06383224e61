"""Refuses Hugging Face configurations that no stack here can run, by name and value."""

from __future__ import annotations

import math
from typing import Any

from unispec.errors import InputError

__all__ = ["check_stack", "positive"]


def positive(name: str, value: Any, source: str) -> float:
    """The value as a float.

    Args:
        name: the field.
        value: what the configuration says.
        source: the file or folder, for the error.

    Raises:
        InputError: the value is zero, negative, NaN, infinite or no number.
    """
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not (is_number and 0 < value < math.inf):
        raise InputError(
            f"{name} {value!r} of {source} is no positive number; correct its config.json"
        )
    return float(value)


def check_stack(hf: Any, head_dim: int, source: str) -> None:
    """Refuses what the stacks have no code for, and sizes that no model can have.

    Args:
        hf: a Hugging Face config.
        head_dim: width of one attention head.
        source: the file or folder, for the errors.

    Raises:
        InputError: an activation, bias or quantisation that is not supported, or a size that
            is not positive or does not fit the others.
    """
    for name, supported in (("hidden_act", "silu"), ("mlp_bias", False)):
        found = getattr(hf, name, supported)
        if found != supported:
            raise InputError(
                f"{name} {found!r} of {source} is not Llama's {supported!r}; use a Llama checkpoint"
            )
    if getattr(hf, "quantization_config", None):
        raise InputError(
            f"quantization_config of {source} is not supported; use the checkpoint that is not"
            " quantised, or a GGUF file"
        )
    for name in (
        "hidden_size",
        "intermediate_size",
        "max_position_embeddings",
        "num_attention_heads",
        "num_hidden_layers",
        "num_key_value_heads",
        "vocab_size",
    ):
        positive(name, getattr(hf, name), source)
    heads, key_heads = hf.num_attention_heads, hf.num_key_value_heads
    if heads % key_heads:
        raise InputError(
            f"num_attention_heads {heads} of {source} is no multiple of num_key_value_heads"
            f" {key_heads}; correct its config.json"
        )
    if head_dim < 2 or head_dim % 2:
        raise InputError(
            f"head_dim {head_dim} of {source} is not even, as rotary embeddings need it;"
            " correct its config.json"
        )
