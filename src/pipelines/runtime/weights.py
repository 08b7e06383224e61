"""A checkpoint's files as a pipeline configuration names them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from max.pipelines.lib import MAXModelConfig, PipelineConfig

from unispec.checkpoints import check_weight_files, read_gguf, read_tensors
from unispec.checkpoints.gguf_parts import gguf_among
from unispec.checkpoints.tensors import bytes_held

__all__ = ["read_weights", "weight_bytes"]


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


def weight_bytes(pipeline_config: PipelineConfig, config: Any) -> int:
    """Bytes of the weights of target and draft, on a CPU as stored, else as computed with.

    Both are counted whole, though a draft may use its target's embedding and head.

    Args:
        config: of the graph: the target's stack, or what has it as `target` and a draft's as
            `draft`.

    Returns:
        By the headers of the files; of files that are not here yet, as many as they have.
    """
    needed = _weight_bytes(pipeline_config.model, getattr(config, "target", config))
    if pipeline_config.draft_model is not None:
        needed += _weight_bytes(pipeline_config.draft_model, config.draft)
    return needed


def _weight_bytes(model_config: MAXModelConfig, stack: Any) -> int:
    root = Path(model_config.model_path)
    paths = [path if path.is_absolute() else root / path for path in model_config.weight_path]
    if not paths or not all(path.is_file() for path in paths):
        return int(model_config.weights_size())
    as_stored = stack.KEEPS_FORMS and stack.devices[0].is_cpu()
    return bytes_held(paths, width=stack.number_bytes, as_stored=as_stored)
