"""Refuses Hugging Face configurations that no stack here can run, by name and value."""

from __future__ import annotations

import math
from typing import Any, Final

from max.pipelines.lib import MAXModelConfig

from unispec.checkpoints.quantisation import check_plain
from unispec.errors import InputError

__all__ = ["check_cache_format", "check_sizes", "check_stack", "check_window", "positive"]

_SIZES: Final = (
    "hidden_size",
    "intermediate_size",
    "max_position_embeddings",
    "num_attention_heads",
    "num_hidden_layers",
    "num_key_value_heads",
    "vocab_size",
)


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


def check_sizes(hf: Any, source: str) -> None:
    """Refuses sizes that no model can have.

    Args:
        hf: a Hugging Face config.
        source: the file or folder, for the errors.

    Raises:
        InputError: a size is missing, not positive or no integer.
    """
    for name in _SIZES:
        value = getattr(hf, name, None)
        positive(name, value, source)
        if not isinstance(value, int):
            raise InputError(f"{name} {value!r} of {source} is no integer; correct its config.json")


def check_cache_format(model_config: MAXModelConfig, source: str) -> None:
    """Refuses a cache of another format than the weights, which attention does not read.

    Args:
        model_config: of the target or the draft.
        source: the file or folder, for the error.

    Raises:
        InputError: `kv_cache_format` is set.
    """
    asked = model_config.kv_cache.kv_cache_format
    if asked is not None:
        raise InputError(
            f"kv_cache_format {asked!r} of {source} is not supported; leave it out, and the cache"
            " has the format of the weights"
        )


def check_window(hf: Any, longest: int | None, source: str) -> None:
    """Refuses a sliding window that a sequence may outgrow.

    Args:
        hf: a Hugging Face config.
        longest: tokens of the longest sequence; None: it is not known.
        source: the file or folder, for the error.

    Raises:
        InputError: `sliding_window` is shorter than the longest sequence, or no size.
    """
    # transformers' Llama has no window, whatever config.json says.
    window = None if hf.model_type == "llama" else getattr(hf, "sliding_window", None)
    if window is None or longest is None:
        return
    if longest > positive("sliding_window", window, source):
        raise InputError(
            f"sliding_window {window} of {source} is not supported for sequences of up to"
            f" {longest} tokens; choose a max_length of at most {window}"
        )


def check_stack(hf: Any, head_dim: int, source: str) -> None:
    """Refuses what the stacks have no code for, and sizes that do not fit each other.

    Args:
        hf: a Hugging Face config.
        head_dim: width of one attention head.
        source: the file or folder, for the errors.

    Raises:
        InputError: an activation, bias or quantisation that is not supported, or a size that
            does not fit the others.
    """
    for name, supported in (("hidden_act", "silu"), ("mlp_bias", False)):
        found = getattr(hf, name, supported)
        if found != supported:
            raise InputError(
                f"{name} {found!r} of {source} is not Llama's {supported!r}; use a Llama checkpoint"
            )
    check_plain(hf, source)
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
