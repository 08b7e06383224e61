"""Pickled checkpoints as safetensors, without running what is in the pickle."""

from __future__ import annotations

import json
import pickle
import re
import shutil
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Final

from unispec.checkpoints.repository import find_file, pickled_files, resolve_model
from unispec.checkpoints.weight_names import (
    OTHER_SUFFIXES,
    PICKLED,
    PICKLED_SUFFIXES,
    READ_SUFFIXES,
    SAFETENSORS,
)
from unispec.errors import InputError
from unispec.new_folder import check_new_folder, new_folder

if TYPE_CHECKING:
    import torch

__all__ = ["convert"]

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
        output: the new folder, missing or empty before and complete afterwards.

    Returns:
        The shapes of all tensors by name.

    Raises:
        InputError: no such checkpoint, one that needs no conversion, a folder that is not
            empty, a damaged file, or one that holds more than tensors.
    """
    check_new_folder(output)
    paths = pickled_files(model)
    with new_folder(output) as working:
        shapes = _write_all(paths, working)
        for path in _companions(model):
            shutil.copyfile(path, working / path.name)
    return shapes


def _companions(model: str) -> list[Path]:
    """All other files of a folder, or those of a repository that a model reads."""
    place = resolve_model(model)
    if isinstance(place, Path):
        files = [path for path in sorted(place.iterdir()) if path.is_file()]
        weights = (*READ_SUFFIXES, *PICKLED_SUFFIXES, *OTHER_SUFFIXES, PICKLED.index)
        return [path for path in files if not path.name.endswith(weights)]
    found = [find_file(model, name) for name in _COMPANIONS]
    return [path for path in found if path is not None]


def _write_all(paths: Sequence[Path], folder: Path) -> dict[str, tuple[int, ...]]:
    """One safetensors file for each pickled one, and an index if there are several."""
    from safetensors.torch import save_file

    shapes: dict[str, tuple[int, ...]] = {}
    places: dict[str, str] = {}
    count = len(paths)
    for number, path in enumerate(paths, start=1):
        name = SAFETENSORS.single if count == 1 else f"model-{number:05}-of-{count:05}.safetensors"
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
        (folder / SAFETENSORS.index).write_text(json.dumps(index, indent=2))
    return shapes


def read_pickled(path: Path) -> dict[str, torch.Tensor]:
    """The tensors of a file of `torch.save`.

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
