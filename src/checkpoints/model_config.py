"""A checkpoint's config.json, checked before anything is built on it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Final

import transformers
from huggingface_hub import constants, hf_hub_download, model_info
from huggingface_hub.errors import RepositoryNotFoundError
from transformers import CONFIG_MAPPING, PretrainedConfig

from unispec.checkpoints.kimi_config import register_with_transformers
from unispec.errors import InputError

__all__ = ["model_config", "read_config_object", "read_model_config"]

_FILE: Final = "config.json"
_HUB_TIMEOUT_S: Final = 10.0
# transformers fills in those of some published model, which then fit no tensor.
_SHAPE: Final = (
    "hidden_size",
    "intermediate_size",
    "num_attention_heads",
    "num_hidden_layers",
    "vocab_size",
)


def read_model_config(model: str) -> PretrainedConfig:
    """Read config.json as transformers does, but refuse what it would guess or stumble over.

    Args:
        model: Folder, or Hugging Face repository id.

    Raises:
        InputError: If there is no such file, it is no JSON object, its `model_type` is
            unknown, its shape is not stated, or a value is of the wrong type or range.
    """
    return model_config(read_config_object(model), model)


def read_config_object(model: str) -> dict[str, Any]:
    """Read config.json as it stands.

    Args:
        model: Folder, or Hugging Face repository id.

    Raises:
        InputError: If there is no such file, or it is no JSON object.
    """
    return _read_object(_find(model), model)


def model_config(stated: dict[str, Any], model: str) -> PretrainedConfig:
    """Make transformers' configuration of what a config.json states, or of what it means.

    Args:
        stated: The file's keys.
        model: What to call the model in errors.

    Raises:
        InputError: If the `model_type` is unknown, the shape is not stated, or a value is of
            the wrong type or range.
    """
    register_with_transformers()
    model_type = stated.get("model_type")
    if not isinstance(model_type, str) or model_type not in CONFIG_MAPPING:
        raise InputError(
            f"{model}: model_type {model_type!r} of {_FILE} is unknown to transformers"
            f" {transformers.__version__}: use a Llama checkpoint"
        )
    for name in _SHAPE:
        if type(value := stated.get(name, 1)) is not int or value < 1:
            raise InputError(
                f"{model}: {name} {value!r} of {_FILE} is no positive integer: correct the file"
            )
    try:
        config: PretrainedConfig = CONFIG_MAPPING[model_type].from_dict(
            dict(stated), name_or_path=model
        )
    # Its checks of values raise whatever a wrong value leads to, ZeroDivisionError included.
    except Exception as error:
        raise InputError(
            f"{model}: {_FILE} cannot be used ({' '.join(str(error).split())}): correct the file"
        ) from error
    # A model that sees images has its shape in the part for the text.
    text, stated = config.get_text_config(), stated.get("text_config", stated)
    for name in _SHAPE:
        # Some architectures state a field under a name of their own.
        names = {name, text.attribute_map.get(name, name)}
        if hasattr(text, name) and names.isdisjoint(stated):
            raise InputError(f"{model}: {_FILE} does not state {name}: use the checkpoint's own")
    if len(config.architectures or ()) != 1:
        raise InputError(
            f"{model}: architectures of {_FILE} is {config.architectures}, expected a list of one"
            " name: correct the file"
        )
    return config


def _find(model: str) -> Path:
    folder = Path(model)
    if folder.is_dir():
        path = folder / _FILE
        if not path.is_file():
            raise InputError(f"{model} has no {_FILE}; give a Hugging Face model folder")
        return path
    try:
        if not constants.HF_HUB_OFFLINE:
            # Fails at once where a download tries again and again.
            model_info(model, timeout=_HUB_TIMEOUT_S)
        return Path(hf_hub_download(model, _FILE))
    except RepositoryNotFoundError as error:
        raise InputError(
            f"{model} is neither a local folder nor a repository of the hub that you may read;"
            " check the path, or log in with `hf auth login`"
        ) from error
    # The errors of the hub's HTTP client have no base that the hub's library exports.
    except Exception as error:
        reason = " ".join(str(error).split())
        raise InputError(
            f"{model} is no local folder, and the hub does not give its {_FILE} ({reason}); check"
            " the path and the network"
        ) from error


def _read_object(path: Path, model: str) -> dict[str, Any]:
    try:
        stated = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{model}: {_FILE} is no JSON ({error}): download it again") from error
    if not isinstance(stated, dict):
        raise InputError(
            f"{model}: {_FILE} is a JSON {type(stated).__name__} and no object: download it again"
        )
    return stated
