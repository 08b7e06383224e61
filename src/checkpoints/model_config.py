"""A checkpoint's config.json, checked before anything is built on it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from unispec.checkpoints.json_object import read_json_object
from unispec.checkpoints.repository import find_config
from unispec.errors import InputError

if TYPE_CHECKING:
    from transformers import PretrainedConfig

__all__ = ["model_config", "read_config_object", "read_model_config"]

_FILE: Final = "config.json"
_FIX: Final = "correct it, or download it again"
# Where transformers looks for keys.
_OBJECTS: Final = ("auto_map", "text_config", "vision_config")
# Of names of fields that say how many layers or experts there are.
_COUNTS: Final = ("layer", "layers", "experts")
# The largest published models have 126 layers and 512 experts.
_MOST: Final = 1000
# transformers fills in those of some published model, which then fit no tensor.
_SHAPE: Final = (
    "hidden_size",
    "intermediate_size",
    "num_attention_heads",
    "num_hidden_layers",
    "vocab_size",
)


def read_model_config(model: str) -> PretrainedConfig:
    """Reads config.json as transformers does, but refuses what it would guess or cannot read.

    Raises:
        InputError: there is no such file, it is no JSON object, its `model_type` is
            unknown, its shape is not stated, or a value is of the wrong type or range.
    """
    return model_config(read_config_object(model), model)


def read_config_object(model: str) -> dict[str, Any]:
    """Reads config.json as it stands, without transformers.

    Raises:
        InputError: there is no such file, or it is no JSON object.
    """
    return read_json_object(find_config(model), label=f"{model}: {_FILE}", fix=_FIX)


def model_config(stated: dict[str, Any], model: str) -> PretrainedConfig:
    """Makes transformers' configuration of what a config.json states, or of what it means.

    Args:
        stated: the file's keys.
        model: what to call the model in errors.

    Raises:
        InputError: the `model_type` is unknown, the shape is not stated, or a value is of
            the wrong type or range.
    """
    import transformers
    from transformers import CONFIG_MAPPING

    from unispec.checkpoints.kimi_config import register_with_transformers

    register_with_transformers()
    model_type = stated.get("model_type")
    if not isinstance(model_type, str) or model_type not in CONFIG_MAPPING:
        raise InputError(
            f"{model}: model_type {model_type!r} of {_FILE} is unknown to transformers"
            f" {transformers.__version__}: use a Llama checkpoint"
        )
    _check_counts(stated, model)
    for name in _OBJECTS:
        if not isinstance(value := stated.get(name), dict | None):
            raise InputError(
                f"{model}: {name} {value!r:.100} of {_FILE} is no JSON object: correct the file"
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
    if isinstance(text, dict):
        raise InputError(f"{model}: a {model_type} has no text_config: correct {_FILE}")
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


def _check_counts(stated: dict[str, Any], model: str) -> None:
    """Refuses counts that lists are made of before any tensor is looked for."""
    for name, value in stated.items():
        if isinstance(value, dict):
            _check_counts(value, model)
        elif name.endswith(_COUNTS) and isinstance(value, int | float) and value > _MOST:
            raise InputError(
                f"{model}: {name} {value} of {_FILE} is more than any model has, at most {_MOST}"
                " are read: correct the file"
            )
