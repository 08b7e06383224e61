"""A draft to begin a fit with: the weights of one that was trained before."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file

from unispec.errors import InputError

from .draft import Draft

__all__ = ["read_config", "take_weights"]

_MEANING = ("architectures", "num_hidden_layers", "block_size", "dflash_config")
"""What must agree beside the tensors' shapes."""


def read_config(folder: Path) -> dict[str, Any]:
    """The config.json of a draft.

    Raises:
        InputError: it cannot be read.
    """
    path = folder / "config.json"
    try:
        config: dict[str, Any] = dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise InputError(f"{path} cannot be read ({error}): give the folder of a draft") from error
    return config


def take_weights(draft: Draft, folder: Path) -> None:
    """Gives a draft the weights of a trained one; which tokens it proposes stays as it is.

    Args:
        draft: takes them.
        folder: of the trained draft: config.json, model.safetensors.

    Raises:
        InputError: it cannot be read, or is a draft of another shape or method.
    """
    theirs, ours = read_config(folder), draft.config()
    for name in _MEANING:
        if theirs.get(name) != ours.get(name):
            raise InputError(
                f"{folder} has {name} {theirs.get(name)!r} where this draft has"
                f" {ours.get(name)!r}: give the same options as for that draft"
            )
    path = folder / "model.safetensors"
    try:
        tensors = load_file(path)
    except (OSError, SafetensorError) as error:
        raise InputError(f"{path} cannot be read ({error}): give the folder of a draft") from error
    tensors.pop("d2t", None)
    found = {name: list(tensor.shape) for name, tensor in tensors.items()}
    wanted = {name: list(tensor.shape) for name, tensor in draft.state_dict().items()}
    for name in sorted(found.keys() | wanted.keys()):
        if found.get(name) != wanted.get(name):
            raise InputError(
                f"{path} has {name} {found.get(name)} where this draft has {wanted.get(name)}:"
                " give a draft for this target, of the same shape"
            )
    draft.load_state_dict(tensors)
