"""Checks of the values of a Hugging Face config, by name."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Final

from max.pipelines.lib import MAXModelConfig

from unispec.errors import InputError

__all__ = [
    "check_cache_format",
    "check_only",
    "check_sizes",
    "positive",
    "positive_integer",
    "text_config",
]

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

    Raises:
        InputError: the value is zero, negative, NaN, infinite or no number.
    """
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not (is_number and 0 < value < math.inf):
        raise InputError(
            f"{name} {value!r} of {source} is no positive number; correct its config.json"
        )
    return float(value)


def positive_integer(name: str, value: Any, source: str, *, least: int = 1) -> int:
    """The value, which is an integer of at least `least`.

    Raises:
        InputError: it is smaller, or no integer.
    """
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        what = "positive integer" if least == 1 else f"integer of at least {least}"
        raise InputError(f"{name} {value!r} of {source} is no {what}; correct its config.json")
    return value


def check_sizes(hf: Any, source: str) -> None:
    """Refuses sizes that no decoder can have.

    Raises:
        InputError: a size is missing, not positive or no integer.
    """
    for name in _SIZES:
        positive_integer(name, getattr(hf, name, None), source)


def check_only(
    hf: Any, supported: Mapping[str, Any], source: str, *, model: str, prefix: str = ""
) -> None:
    """Refuses what the stack has no code for.

    Args:
        supported: the only value that each field may have, where it is stated.
        model: the stack's name, such as "Llama".
        prefix: what to say before a field's name in errors.

    Raises:
        InputError: a field has another value.
    """
    for name, value in supported.items():
        found = getattr(hf, name, value)
        found = list(found) if isinstance(found, tuple) else found
        if found != value:
            raise InputError(
                f"{prefix}{name} {found!r} of {source} is not {model}'s {value!r}; use a {model}"
                " checkpoint"
            )


def check_cache_format(model_config: MAXModelConfig, source: str) -> None:
    """Refuses a cache of another format than the weights, which attention does not read.

    Raises:
        InputError: `kv_cache_format` is set.
    """
    cache_format = model_config.kv_cache.kv_cache_format
    if cache_format is not None:
        raise InputError(
            f"kv_cache_format {cache_format!r} of {source} is not supported; leave it out, and the"
            " cache has the format of the weights"
        )


def text_config(model_config: MAXModelConfig) -> Any:
    """The Hugging Face config; of a model that reads images, its part for the text.

    Raises:
        InputError: there is none.
    """
    hf: Any = model_config.huggingface_config
    if hf is None:
        raise InputError(
            f"{model_config.model_name} has no config.json; give a Hugging Face model folder"
        )
    return hf.get_text_config()
