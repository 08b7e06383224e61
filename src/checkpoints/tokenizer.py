"""A checkpoint's tokenizer."""

from __future__ import annotations

from pathlib import Path
from typing import Final

from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, LocalEntryNotFoundError
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from unispec.errors import InputError

from .kimi_config import KimiK25HFConfig
from .kimi_tokenizer import build_kimi_tokenizer

__all__ = ["read_tokenizer"]

_RANKS: Final = "tiktoken.model"


def read_tokenizer(model: str, model_type: str) -> PreTrainedTokenizerFast:
    """Reads tokenizer.json, or of Kimi K2.5 the files that its repository has instead.

    Args:
        model: folder, or Hugging Face repository id.
        model_type: of config.json.

    Raises:
        InputError: a file is missing or damaged.
    """
    folder = Path(model).expanduser()
    is_local = folder.is_dir()
    name = str(folder) if is_local else model
    # Before tokenizer.json: beside one, Kimi's tokenizer_config.json asks for code that is not run.
    if model_type == KimiK25HFConfig.model_type and (ranks := _find(name, _RANKS, needed=False)):
        return _read_kimi(name, ranks)
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
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


def _read_kimi(model: str, ranks: Path) -> PreTrainedTokenizerFast:
    config = _find(model, "tokenizer_config.json")
    if config is None:
        raise InputError(
            f"{model} has {_RANKS} and no tokenizer_config.json; copy it from the model's"
            " repository"
        )
    return build_kimi_tokenizer(ranks, config, _find(model, "chat_template.jinja"))


def _find(model: str, name: str, *, needed: bool = True) -> Path | None:
    """Where a file of a folder or of a repository lies; none if it has no such file.

    Raises:
        InputError: the hub does not say, and the file would be needed if it is there.
    """
    folder = Path(model)
    if folder.is_dir():
        return path if (path := folder / name).is_file() else None
    try:
        return Path(hf_hub_download(model, name))
    except (EntryNotFoundError, HfHubHTTPError) as error:
        unasked = not isinstance(error, EntryNotFoundError)
        # The hub could not be asked, and the file is not in its cache either.
        unasked |= isinstance(error, LocalEntryNotFoundError)
        if not (unasked and needed):
            return None
        raise InputError(
            f"{name} of {model} was not downloaded before, and the hub does not give it"
            f" ({' '.join(str(error).split())}): check the network and your access"
        ) from error
