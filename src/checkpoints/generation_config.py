"""A checkpoint's generation_config.json: sampling defaults, and what ends an answer."""

from __future__ import annotations

from typing import Any, Final

from unispec.checkpoints.json_object import read_json_object
from unispec.checkpoints.repository import find_file
from unispec.errors import InputError

__all__ = ["read_eos_token_ids", "read_generation_config"]

_FILE: Final = "generation_config.json"
_EOS: Final = "eos_token_id"


def read_generation_config(model: str) -> dict[str, Any]:
    """What a checkpoint states of how to generate; empty if it states nothing.

    Raises:
        InputError: the checkpoint's generation_config.json is no JSON object.
    """
    file = find_file(model, _FILE)
    if file is None:
        return {}
    return read_json_object(file, label=str(file), fix="correct or remove it")


def read_eos_token_ids(model: str, config: Any) -> set[int]:
    """The tokens that end an answer, of config.json and of generation_config.json.

    A chat model often states only in the second file what ends a turn.

    Args:
        config: its Hugging Face config; a part for the text is read where the whole says nothing.

    Raises:
        InputError: generation_config.json is no JSON object, or an id is no token of the model.
    """
    text = config.get_text_config()
    whole = getattr(config, _EOS, None)
    stated = {
        "config.json": getattr(text, _EOS, None) if whole is None else whole,
        _FILE: read_generation_config(model).get(_EOS),
    }
    found: set[int] = set()
    for file, value in stated.items():
        ids = value if isinstance(value, list) else [] if value is None else [value]
        for token in ids:
            if type(token) is not int or not 0 <= token < text.vocab_size:
                raise InputError(
                    f"{_EOS} {value!r} in {file} of {model} is no token of the model's vocabulary"
                    f" of {text.vocab_size}; correct the file"
                )
        found.update(ids)
    return found
