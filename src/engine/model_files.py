"""Where the files of an engine's models are, and that they are whole."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from max.pipelines.lib import MAXModelConfig, PipelineConfig

from unispec.checkpoints import check_weight_files
from unispec.checkpoints.draft_kinds import (
    check_draft_files,
    draft_kind,
    method_of_draft,
    tensor_shapes,
)
from unispec.checkpoints.gguf_agreement import check_agreement
from unispec.checkpoints.gguf_parts import gguf_among
from unispec.checkpoints.model_config import read_config_object
from unispec.checkpoints.repository import find_config, resolve_model, weight_files
from unispec.encodings import FLOAT32
from unispec.errors import InputError
from unispec.methods import FACTS, Method, generations, method_of_architecture

from .config import EngineConfig

__all__ = ["add_weights", "draft_files", "draft_paths", "drafted_method", "location"]


def location(model: str) -> dict[str, Any]:
    """Fields of MAX's configurations that say where a model is, which has the user's name there.

    MAX guesses a number format from the names of weight files: it sees another file until all of
    its decisions are made, and ours depend on what is in the files.
    """
    config = find_config(model)
    folder = str(config.parent)
    return {"model_path": folder, "weight_path": [config], "served_model_name": model}


def add_weights(pipeline_config: PipelineConfig, config: EngineConfig) -> None:
    """Names the weight files that have no name there yet, all of them whole.

    Those of a repository are downloaded.

    Raises:
        InputError: a file is missing, damaged or of an unknown format.
    """
    paths = weight_files(config.model, config.weight_path)
    # MAX's configurations are frozen, their lists are not.
    pipeline_config.model.weight_path[:] = _checked(
        paths, pipeline_config.model, config.devices, config.quantization_encoding
    )
    draft = pipeline_config.draft_model
    if draft is not None and draft.weight_path == location(draft.model_name)["weight_path"]:
        draft.weight_path[:] = draft_files(draft, config)


def draft_paths(config: EngineConfig) -> list[Path] | None:
    """The weight files in the draft's folder; None of a repository, which would be downloaded.

    They are None, too, where the folder has no weights, which is told when these are read.
    """
    draft = config.draft_model
    if draft is None or not isinstance(resolve_model(draft), Path):
        return None
    try:
        return weight_files(draft)
    except InputError:
        return None


def drafted_method(config: EngineConfig, paths: Sequence[Path] | None) -> Method | None:
    """The method that `config` asks for, in the generation that its draft is of.

    Weights of a repository are downloaded where its config.json does not tell.

    Args:
        paths: of `draft_paths`.

    Raises:
        InputError: there is no such draft, or its config.json is damaged.
    """
    asked, draft = config.speculative_method, config.draft_model
    if asked is None or draft is None or generations(asked) == (asked,):
        return asked
    stated = read_config_object(draft)
    if paths is None and draft_kind(stated) is not None:
        return method_of_draft(asked, stated)
    return method_of_draft(asked, stated, tensor_shapes(paths or weight_files(draft)))


def draft_files(
    draft: MAXModelConfig, config: EngineConfig, paths: list[Path] | None = None
) -> list[Path]:
    """The files of the draft that `config` has, which are whole and hold a draft of its method.

    Args:
        draft: its class says of which generation it is.
        paths: the files, where they are known.

    Raises:
        InputError: a file is missing, damaged, of an unknown format, or of another kind of draft.
    """
    assert config.draft_model is not None and config.speculative_method is not None
    paths = weight_files(config.draft_model) if paths is None else paths
    hf: Any = draft.huggingface_config
    # Methods that have a draft are MAX's, too, by one name for all generations.
    max_method = FACTS[config.speculative_method].max_method or config.speculative_method
    method = method_of_architecture(max_method, hf.architectures or ())
    check_draft_files(method, paths, source=config.draft_model)
    return _checked(paths, draft, config.devices, config.draft_quantization_encoding)


def _checked(
    paths: list[Path], model: MAXModelConfig, devices: str, encoding: str | None
) -> list[Path]:
    """The weight files, all of them whole and in agreement with config.json."""
    # What cannot stay as it is stored is told when it is read.
    check_weight_files(paths, as_stored=devices == "cpu" and encoding != FLOAT32)
    if gguf := gguf_among(paths):
        check_agreement(gguf, model.huggingface_config, source=model.model_name)
    return paths
