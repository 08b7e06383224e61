"""A checkpoint as it is read from its files."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from max.pipelines.lib import MAXModelConfig

from unispec.checkpoints import Tensor
from unispec.pipelines.runtime.weights import read_weights

__all__ = ["Checkpoint", "read_checkpoint"]


class Checkpoint(NamedTuple):
    """The tensors of a target or a draft."""

    tensors: Mapping[str, Tensor]
    """By the names that the files give them."""
    config: Any
    """The Hugging Face config."""
    source: str
    """The file or folder, for errors."""


def read_checkpoint(model_config: MAXModelConfig) -> Checkpoint:
    """Reads the files that a model's configuration names.

    Args:
        model_config: of the target or the draft.

    Raises:
        InputError: a file is missing or damaged.
    """
    tensors, source = read_weights(model_config)
    return Checkpoint(tensors, model_config.huggingface_config, source)
