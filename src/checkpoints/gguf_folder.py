"""A GGUF file as a model folder: its description in Hugging Face's files, beside links to it."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

from unispec.checkpoints.gguf import GGUFCheckpoint, read_gguf
from unispec.checkpoints.gguf_parts import part_paths
from unispec.errors import InputError

__all__ = ["DESCRIPTION", "cache_folder", "gguf_model_folder", "make_once", "write_description"]

DESCRIPTION: Final = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
)
"""What `write_description` writes."""

# A new one where what is written changes: folders of another one are not used.
_FORM: Final = "1"
_SUFFIX: Final = ".gguf"


def cache_folder() -> Path:
    """Where what is made once is kept: `$UNISPEC_CACHE`, or ~/.cache/unispec."""
    cache = os.environ.get("UNISPEC_CACHE")
    return Path(cache).expanduser() if cache else Path.home() / ".cache" / "unispec"


def gguf_model_folder(path: Path) -> Path:
    """A model folder of a GGUF file alone, made once in the cache.

    It has the configuration and the tokenizer that the file describes, and links to the file or
    to all of its parts; the weights stay where they are. A file that changes gets another folder.

    Args:
        path: the file, or a part of a split one.

    Raises:
        InputError: the file is damaged, or describes a model or a tokenizer that is not
            supported; or the folder cannot be written.
    """
    parts = [part.absolute() for part in part_paths(path) if part.is_file()]
    stats = [part.stat() for part in parts]
    identity = [(str(p), s.st_size, s.st_mtime_ns) for p, s in zip(parts, stats, strict=True)]
    digest = hashlib.sha256(repr((_FORM, identity)).encode()).hexdigest()[:16]
    folder = cache_folder() / "gguf" / f"{path.stem}-{digest}"

    def write(unfinished: Path) -> None:
        write_description(read_gguf(path), unfinished)
        for part in parts:
            name = part.name if part.name.endswith(_SUFFIX) else part.name + _SUFFIX
            (unfinished / name).symlink_to(part)

    try:
        return make_once(folder, DESCRIPTION, write)
    except OSError as error:
        raise InputError(
            f"{folder}, for the description of {path}, cannot be written"
            f" ({error.strerror or error}): make room, or set UNISPEC_CACHE to another folder"
        ) from error


def write_description(checkpoint: GGUFCheckpoint, folder: Path) -> None:
    """Writes the files of `DESCRIPTION`.

    Raises:
        InputError: the tokenizer is not supported.
    """
    config = checkpoint.config
    tokenizer = checkpoint.tokenizer()
    special_ids = {name: config[f"{name}_id"] for name in ("bos_token", "eos_token", "pad_token")}
    _write_json(folder / "config.json", config)
    _write_json(
        folder / "generation_config.json",
        {f"{name}_id": token_id for name, token_id in special_ids.items()},
    )
    tokenizer.save(str(folder / "tokenizer.json"))
    # Of several that end an answer, the first is the end of a text.
    first = {name: ids[0] if isinstance(ids, list) else ids for name, ids in special_ids.items()}
    _write_json(
        folder / "tokenizer_config.json",
        {
            **{
                name: None if token_id is None else tokenizer.id_to_token(token_id)
                for name, token_id in first.items()
            },
            "chat_template": checkpoint.chat_template,
            "clean_up_tokenization_spaces": False,
            "model_max_length": config["max_position_embeddings"],
            # Takes tokenizer.json as it is; model classes rebuild parts of it.
            "tokenizer_class": "PreTrainedTokenizerFast",
        },
    )


def make_once(folder: Path, names: tuple[str, ...], write: Callable[[Path], None]) -> Path:
    """Makes a folder that is complete or not there, also when two processes make it at once.

    Args:
        folder: where it is to be.
        names: files that a complete one has; such a folder is left as it is.
        write: writes into the folder that it is given.

    Returns:
        The folder.
    """
    if _has(folder, names):
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    unfinished = Path(tempfile.mkdtemp(prefix=f"{folder.name}.", dir=folder.parent))
    try:
        write(unfinished)
        try:
            unfinished.rename(folder)
        except OSError:
            # Another process was faster; any other reason is an error.
            if not _has(folder, names):
                raise
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    return folder


def _has(folder: Path, names: tuple[str, ...]) -> bool:
    return all((folder / name).is_file() for name in names)


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
