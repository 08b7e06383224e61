"""The weights that a fit starts from: those of a draft that was trained before."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load
from torch import Tensor

from unispec.checkpoints import check_weight_files
from unispec.checkpoints.json_object import read_json_object
from unispec.errors import InputError

from .draft import Draft

__all__ = ["read_mask_token", "read_weights", "take_weights"]

_FIX = "give the folder of a draft"
_NOT_TRAINED = ("d2t", "lm_head.weight", "t2d")
"""Tensors that a draft has anew of its target and of the tokens that it proposes."""
_SAME_FIELDS = (
    "architectures",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "block_size",
    "dflash_config",
    "fc_norm",
    "norm_output",
)
"""Fields of config.json that must be the same, besides the shapes of tensors."""


def read_mask_token(folder: Path, vocab_size: int) -> int:
    """The mask token of a DFlash draft, whose embedding it has learnt to read.

    Raises:
        InputError: it has none, or one beyond the target's tokens.
    """
    special = _read_config(folder).get("dflash_config")
    mask = special.get("mask_token_id") if isinstance(special, dict) else None
    if not isinstance(mask, int) or not 0 <= mask < vocab_size:
        raise InputError(
            f"{folder / 'config.json'} has the mask token {mask!r} in dflash_config, where 0 to"
            f" {vocab_size - 1} is wanted: give the folder of a DFlash draft for this target"
        )
    return mask


def take_weights(draft: Draft, folder: Path) -> None:
    """Gives a draft the weights of a trained one; which tokens it proposes stays as it is.

    Raises:
        InputError: see `read_weights`.
    """
    tensors, digest = read_weights(draft, folder)
    draft.load_state_dict(tensors)
    draft.initial_draft = f"{folder.resolve().name}, sha256 {digest[:12]}"


def read_weights(draft: Draft, folder: Path) -> tuple[dict[str, Tensor], str]:
    """Reads the tensors of a trained draft and the digest of their file.

    Args:
        draft: its tensors must have the same shapes.
        folder: the trained draft, config.json and model.safetensors.

    Raises:
        InputError: it cannot be read, or is a draft of another shape or method.
    """
    theirs, ours = _read_config(folder), draft.config()
    for name in _SAME_FIELDS:
        if theirs.get(name) != ours.get(name):
            raise InputError(
                f"{folder} has {name} {theirs.get(name)!r} where this draft has"
                f" {ours.get(name)!r}: give the same options as for that draft"
            )
    path = folder / "model.safetensors"
    # The size before the content: a file may be larger than the memory.
    check_weight_files([path])
    try:
        content = path.read_bytes()
        tensors = load(content)
    except (OSError, SafetensorError) as error:
        raise InputError(f"{path} cannot be read ({error}): {_FIX}") from error
    for name in _NOT_TRAINED:
        tensors.pop(name, None)
    found = {name: list(tensor.shape) for name, tensor in tensors.items()}
    wanted = {name: list(tensor.shape) for name, tensor in draft.state_dict().items()}
    for name in sorted(found.keys() | wanted.keys()):
        if found.get(name) != wanted.get(name):
            raise InputError(
                f"{path} has {name} {found.get(name, 'missing')} where this draft has"
                f" {wanted.get(name, 'nothing')}: give a draft that was trained for this target"
            )
    return tensors, hashlib.sha256(content).hexdigest()


def _read_config(folder: Path) -> dict[str, Any]:
    path = folder / "config.json"
    return read_json_object(path, label=str(path), fix=_FIX)
