"""A checkpoint's tokenizer."""

from __future__ import annotations

from pathlib import Path
from typing import Final

from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from unispec.errors import InputError

from .kimi_config import KimiK25HFConfig
from .kimi_tokenizer import build_kimi_tokenizer

__all__ = ["read_tokenizer"]

_RANKS: Final = "tiktoken.model"


def read_tokenizer(model: str, model_type: str) -> PreTrainedTokenizerFast:
    """Reads tokenizer.json; without one Kimi K2.5's own files.

    Args:
        model: folder, or Hugging Face repository id.
        model_type: of config.json.

    Raises:
        InputError: there is no such file, or it is damaged.
    """
    folder = Path(model).expanduser()
    is_local = folder.is_dir()
    name = str(folder) if is_local else model
    try:
        if model_type == KimiK25HFConfig.model_type and not _find(name, "tokenizer.json"):
            return _read_kimi(name)
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
    except InputError:
        raise
    # Damaged files raise what the parsers stumble over, a bare Exception included.
    except Exception as error:
        if is_local and not (folder / "tokenizer.json").is_file():
            raise InputError(
                f"{model} has no tokenizer.json; copy it from the model's repository"
            ) from error
        raise InputError(
            f"the tokenizer of {model} cannot be read ({' '.join(str(error).split())}); download"
            " tokenizer.json and tokenizer_config.json again"
        ) from error
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        raise InputError(f"{model} has no fast tokenizer; add a tokenizer.json")
    return tokenizer


def _read_kimi(model: str) -> PreTrainedTokenizerFast:
    ranks, config = (_find(model, name) for name in (_RANKS, "tokenizer_config.json"))
    if ranks is None or config is None:
        raise InputError(
            f"{model} has neither tokenizer.json nor both {_RANKS} and tokenizer_config.json; copy"
            " them from the model's repository"
        )
    return build_kimi_tokenizer(ranks, config, _find(model, "chat_template.jinja"))


def _find(model: str, name: str) -> Path | None:
    """Where a file of a folder or of a repository lies; none if it has no such file."""
    folder = Path(model)
    if folder.is_dir():
        return path if (path := folder / name).is_file() else None
    try:
        return Path(hf_hub_download(model, name))
    except EntryNotFoundError:
        return None
