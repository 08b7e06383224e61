"""A draft's config.json, brought from the dialects of other projects into a Llama's form."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from transformers import AutoConfig, PretrainedConfig

from unispec.checkpoints.draft_kinds import check_draft_kind
from unispec.checkpoints.model_config import model_config, read_config_object
from unispec.errors import InputError
from unispec.methods import FACTS, Method

__all__ = ["adopt", "flat_config", "read_draft_config", "register_with_transformers"]

_LAYER: Final = "transformer_layer_config"


class NestedEagleConfig(PretrainedConfig):  # type: ignore[no-untyped-call]
    """vLLM's first EAGLE format, which has the whole configuration under `model`."""

    model_type = "eagle"
    """As config.json has it."""


def register_with_transformers() -> None:
    """Lets transformers read config.json of such a draft."""
    AutoConfig.register(NestedEagleConfig.model_type, NestedEagleConfig, exist_ok=True)


def read_draft_config(
    draft: str, method: Method, shapes: Mapping[str, tuple[int, ...]] | None = None
) -> PretrainedConfig:
    """Reads config.json, as published or in the form of the `speculators` library.

    Args:
        shapes: of the checkpoint's tensors by name; None: the weights are not at hand.

    Raises:
        InputError: the draft is of another kind, or what `model_config` refuses.
    """
    # MAX reads the file too, and knows no other place for what stands in it.
    register_with_transformers()
    stated = read_config_object(draft)
    names = stated.get("architectures")
    names = [] if names is None else names
    # MAX reads them from the file, before what counts is put in their place.
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise InputError(
            f"{draft}: architectures {names!r:.100} of config.json is no list of names: correct the"
            " file"
        )
    check_draft_kind(method, stated, shapes, source=draft)
    return model_config(flat_config(stated, method, source=draft), draft)


def flat_config(stated: Mapping[str, Any], method: Method, *, source: str) -> dict[str, Any]:
    """A config.json of any dialect with all keys at the top level, of the class that MAX knows.

    Args:
        stated: config.json as it stands in the file.

    Raises:
        InputError: the nested part is no object.
    """
    flat, draft = dict(stated), FACTS[method].draft
    assert draft is not None
    if "speculators_model_type" in stated:
        layer = _part(flat, _LAYER, source)
        flat = {"model_type": draft.model_type} | flat | layer
        if method == "dflash":
            # Versions that did not write the key knew no causal block.
            flat.setdefault("sliding_window_non_causal", True)
    elif method == "eagle3":
        # Others train one layer, and some of their files state the target's number.
        flat["num_hidden_layers"] = 1
    elif stated.get("model_type") == NestedEagleConfig.model_type:
        flat = flat | {"model_type": "llama"} | _part(flat, "model", source)
    # Whoever published it: which draft it is, the method and the tensors say.
    return flat | {"architectures": [draft.architecture]}


def adopt(config: PretrainedConfig, other: PretrainedConfig) -> None:
    """Makes one configuration the same as another.

    MAX keeps the object that it read from the file for the process and takes no other.

    Args:
        config: changed in place, its class too.
        other: what it becomes.
    """
    config.__class__ = type(other)
    vars(config).clear()
    vars(config).update(vars(other))


def _part(flat: dict[str, Any], name: str, source: str) -> dict[str, Any]:
    """Takes an object out of the configuration."""
    part = flat.pop(name, None)
    if not isinstance(part, dict):
        raise InputError(
            f"{source}: {name} of config.json is no object but {part!r}: download it again"
        )
    return part
