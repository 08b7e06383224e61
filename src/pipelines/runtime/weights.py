"""A checkpoint's files as a pipeline configuration names them."""

from __future__ import annotations

from typing import Any

from max.pipelines.lib import MAXModelConfig

from unispec.checkpoints import check_weight_files, read_gguf, read_tensors
from unispec.checkpoints.gguf_parts import gguf_among

__all__ = ["read_weights"]


def read_weights(
    model_config: MAXModelConfig, *, float8_stays: bool = False, as_stored: bool = False
) -> tuple[dict[str, Any], str]:
    """Reads a checkpoint's files; returns its tensors and what to call it in errors.

    The names are Hugging Face's, of GGUF files too. The tensors are arrays, and of type
    `StoredMatrix` where they stay as they are stored.

    Args:
        float8_stays: whether float8 is computed with as it is; else it is dequantised to float32.
        as_stored: see `read_tensors`.

    Raises:
        InputError: a file is missing or damaged, or the weights do not fit the memory.
    """
    paths = model_config.resolved_weight_paths()
    source = model_config.model_name
    if gguf := gguf_among(paths):
        check_weight_files(paths, as_stored=as_stored)
        return dict(read_gguf(gguf, as_stored).tensors), source
    return read_tensors(paths, float8_stays=float8_stays, as_stored=as_stored), source
