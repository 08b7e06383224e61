"""Pickled checkpoints as safetensors, without running what is in the pickle."""

from __future__ import annotations

import json
import pickle
import re
import shutil
import tempfile
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Final

from unispec.checkpoints.json_object import read_json_object
from unispec.checkpoints.repository import find_config, find_file, resolve_model
from unispec.errors import InputError

if TYPE_CHECKING:
    import torch

__all__ = ["convert"]

_INDEX: Final = "model.safetensors.index.json"
_SINGLE: Final = "model.safetensors"
_PICKLED_INDEX: Final = "pytorch_model.bin.index.json"
_PICKLED: Final = "pytorch_model.bin"
# Endings of weights in any form, and of what a training leaves behind.
_WEIGHTS: Final = frozenset(
    (".bin", ".ckpt", ".gguf", ".h5", ".msgpack", ".onnx", ".pkl", ".pt", ".pth", ".safetensors")
)
# What a repository has beside its weights, as far as a model reads it.
_COMPANIONS: Final = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "README.md",
    "LICENSE",
)


def convert(model: str, output: Path) -> dict[str, tuple[int, ...]]:
    """Writes a checkpoint's `pytorch_model.bin`, or its shards, as safetensors.

    Needs torch. The other files of the checkpoint are copied as they are.

    Args:
        model: folder, or name of a repository of the hub.
        output: the new folder, missing or empty before and complete afterwards.

    Returns:
        The shapes of all tensors by name.

    Raises:
        InputError: no such checkpoint, one that needs no conversion, a folder that is not
            empty, a damaged file, or one that holds more than tensors.
    """
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise InputError(f"{output} is there already and not empty; give another folder")
    paths = _pickled_files(model)
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        working = Path(tempfile.mkdtemp(prefix=f".{output.name}-", dir=output.parent))
    except OSError as error:
        raise InputError(f"{output} cannot be written ({error}); give another folder") from error
    try:
        shapes = _write_all(paths, working)
        for path in _companions(model):
            shutil.copyfile(path, working / path.name)
        working.chmod(0o755)
        working.rename(output)
    except OSError as error:
        raise InputError(f"{output} cannot be written ({error}); make room, or give another") from (
            error
        )
    finally:
        shutil.rmtree(working, ignore_errors=True)
    return shapes


def _pickled_files(model: str) -> list[Path]:
    """The files of `pytorch_model.bin`, all shards of it; of the hub they are downloaded."""
    find_config(model)
    if any(find_file(model, name) for name in (_SINGLE, _INDEX)):
        raise InputError(f"{model} has safetensors and needs no conversion; use it as it is")
    index = find_file(model, _PICKLED_INDEX)
    names = [_PICKLED] if index is None else _names_of_index(index, model)
    paths = [find_file(model, name, needed=True) for name in names]
    missing = [name for name, path in zip(names, paths, strict=True) if path is None]
    if missing and index is None:
        raise InputError(f"{model} has no {_PICKLED}; give a checkpoint that has one")
    if missing:
        raise InputError(f"{model} lacks {missing[0]}; download the whole checkpoint")
    return [path for path in paths if path is not None]


def _names_of_index(index: Path, model: str) -> list[str]:
    label, fix = f"{_PICKLED_INDEX} of {model}", "download it again"
    named = read_json_object(index, label=label, fix=fix).get("weight_map")
    found = list(named.values()) if isinstance(named, dict) else []
    names = {name for name in found if isinstance(name, str) and Path(name).name == name}
    if not names or not names.issuperset(found):
        raise InputError(f"{label} has no weight_map with the names of files: {fix}")
    return sorted(names)


def _companions(model: str) -> list[Path]:
    """All other files of a folder, or those of a repository that a model reads."""
    place = resolve_model(model)
    if isinstance(place, Path):
        files = [path for path in sorted(place.iterdir()) if path.is_file()]
        others = [path for path in files if path.suffix not in _WEIGHTS]
        return [path for path in others if path.name != _PICKLED_INDEX]
    found = [find_file(model, name) for name in _COMPANIONS]
    return [path for path in found if path is not None]


def _write_all(paths: Sequence[Path], folder: Path) -> dict[str, tuple[int, ...]]:
    """One safetensors file for each pickled one, and an index if there are several."""
    from safetensors.torch import save_file

    shapes: dict[str, tuple[int, ...]] = {}
    places: dict[str, str] = {}
    count = len(paths)
    for number, path in enumerate(paths, start=1):
        name = _SINGLE if count == 1 else f"model-{number:05}-of-{count:05}.safetensors"
        tensors = _plain(read_pickled(path), path)
        if twice := sorted(places.keys() & tensors.keys()):
            raise InputError(
                f"{path} repeats tensor {twice[0]!r} of another file: give the shards of one"
                " checkpoint only"
            )
        save_file(tensors, folder / name, metadata={"format": "pt"})
        places |= dict.fromkeys(tensors, name)
        shapes |= {key: tuple(tensor.shape) for key, tensor in tensors.items()}
    if count > 1:
        index = {"metadata": {}, "weight_map": places}
        (folder / _INDEX).write_text(json.dumps(index, indent=2))
    return shapes


def read_pickled(path: Path) -> dict[str, torch.Tensor]:
    """The tensors of a file of `torch.save`.

    Args:
        path: the file.

    Raises:
        InputError: the file is damaged, or holds something else than named tensors.
    """
    import torch

    try:
        # Mapped, a file of several GB is not read at once; the old format cannot be.
        found = torch.load(
            path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path)
        )
    except pickle.UnpicklingError as error:
        named = re.search(r"GLOBAL ([\w.]+)", str(error))
        what = f"asks for {named[1]}" if named else "is no plain pickle of tensors"
        raise InputError(
            f"{path} {what}, which may run code, so it is not opened: use a checkpoint from a"
            " source that you trust, in safetensors"
        ) from error
    # Damage shows in whatever the reader stumbles over.
    except Exception as error:
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise InputError(
            f"{path} is damaged or no file of torch.save ({reason[0][:200]}): download it again"
        ) from error
    if not isinstance(found, Mapping) or not found:
        raise InputError(
            f"{path} holds a {type(found).__name__} and no named tensors: use the checkpoint's"
            " pytorch_model.bin"
        )
    for name, tensor in found.items():
        if not isinstance(name, str) or not isinstance(tensor, torch.Tensor):
            raise InputError(
                f"{path} holds {name!r}, a {type(tensor).__name__} and no tensor: use the"
                " checkpoint's pytorch_model.bin"
            )
        if tensor.layout != torch.strided or tensor.is_quantized or tensor.is_complex():
            raise InputError(
                f"{path}: tensor {name!r} is sparse, quantised or complex, which safetensors cannot"
                " hold: use a checkpoint of plain tensors"
            )
    return dict(found)


def _plain(tensors: Mapping[str, torch.Tensor], path: Path) -> dict[str, torch.Tensor]:
    """Tensors that lie in memory of their own, as safetensors wants them."""
    seen: set[int] = set()
    plain: dict[str, torch.Tensor] = {}
    for name, tensor in tensors.items():
        storage = tensor.untyped_storage()
        own = storage.nbytes() == tensor.nbytes and storage.data_ptr() not in seen
        seen.add(storage.data_ptr())
        plain[name] = tensor.detach().contiguous() if own else tensor.detach().clone().contiguous()
    return plain
