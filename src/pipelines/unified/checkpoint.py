"""A checkpoint as it is read from its files."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from max.pipelines.lib import MAXModelConfig

from unispec.checkpoints import Weight
from unispec.pipelines.runtime.weights import read_weights

__all__ = ["Checkpoint", "read_checkpoint"]


class Checkpoint(NamedTuple):
    """The tensors of a target or a draft."""

    tensors: Mapping[str, Weight]
    """By the names that the files give them."""
    config: Any
    """The Hugging Face config."""
    source: str
    """The file or folder, for errors."""


def read_checkpoint(model_config: MAXModelConfig) -> Checkpoint:
    """Reads the files that a model's configuration names.

    On a CPU matrices stay as they are stored.

    Args:
        model_config: of the target or the draft.

    Raises:
        InputError: a file is missing or damaged.
    """
    on_cpu = all(spec.device_type == "cpu" for spec in model_config.device_specs)
    tensors, source = read_weights(model_config, as_stored=on_cpu)
    return Checkpoint(tensors, model_config.huggingface_config, source)
