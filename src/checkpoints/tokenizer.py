"""A checkpoint's tokenizer."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final

from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from unispec.errors import InputError

from .fast_tokenizer import build_fast_tokenizer
from .json_object import read_json_object
from .kimi_config import KimiK25HFConfig
from .kimi_tokenizer import build_kimi_tokenizer
from .repository import find_file
from .sentencepiece_model import read_sentencepiece

__all__ = ["read_tokenizer"]

_RANKS: Final = "tiktoken.model"


def read_tokenizer(model: str, model_type: str) -> PreTrainedTokenizerFast:
    """Reads a model's tokenizer; its ids are those of tokenizer.json where there is one.

    That is what `tokenizers.Tokenizer.from_file` reads, with its decoder. The class that
    tokenizer_config.json names is not asked: transformers 5 lets some classes build the tokenizer
    anew, and then blanks and ends of lines are lost. Where tokenizer_config.json does count says
    `build_fast_tokenizer`. Without a tokenizer.json, `tokenizer.model` is converted; of Kimi K2.5,
    `tiktoken.model`.

    Args:
        model_type: of config.json.

    Raises:
        InputError: a file is missing or damaged.
    """
    # Before tokenizer.json: Kimi's tokenizer_config.json belongs to the ranks.
    if model_type == KimiK25HFConfig.model_type and (ranks := find_file(model, _RANKS)):
        return _read_kimi(model, ranks)
    whole = find_file(model, "tokenizer.json")
    pieces = None if whole else find_file(model, "tokenizer.model")
    try:
        config = _read_config(model)
        if whole is not None:
            tokenizer = Tokenizer.from_file(str(whole))
        elif pieces is not None:
            tokenizer = read_sentencepiece(pieces, legacy=config.get("legacy") is not False)
            config = _of_sentencepiece(model, config)
        else:
            # If the hub cannot be asked, it says so.
            find_file(model, "tokenizer.json", needed=True)
            raise InputError(
                f"{model} has no tokenizer.json and no tokenizer.model; copy one of them from the"
                " model's repository"
            )
        template = find_file(model, "chat_template.jinja")
        return build_fast_tokenizer(
            tokenizer, config, template.read_text(encoding="utf-8") if template else None
        )
    except InputError:
        raise
    # Damaged files raise what the parsers stumble over, a bare Exception included.
    except Exception as error:
        raise InputError(
            f"the tokenizer of {model} cannot be read ({' '.join(str(error).split())}); download"
            f" {'tokenizer.json' if whole else 'tokenizer.model'} and tokenizer_config.json again"
        ) from error


def _read_config(model: str) -> dict[str, Any]:
    """tokenizer_config.json, and what older checkpoints state in special_tokens_map.json only."""
    config: dict[str, Any] = {}
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        config |= _read_object(model, name)
    return config


def _of_sentencepiece(model: str, config: dict[str, Any]) -> dict[str, Any]:
    """The configuration with what goes without saying beside a tokenizer.model."""
    added = {
        str(number): {"content": token}
        for token, number in _read_object(model, "added_tokens.json").items()
    }
    listed = config.get("added_tokens_decoder") or {}
    usual = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "add_bos_token": True}
    return {
        **usual,
        **config,
        "added_tokens_decoder": {**added, **listed},
        "tokenizer_class": "LlamaTokenizer",
    }


def _read_object(model: str, name: str) -> dict[str, Any]:
    """A JSON object; empty if there is no such file."""
    path = find_file(model, name)
    if path is None:
        return {}
    return read_json_object(
        path, label=f"{name} of the tokenizer of {model}", fix="download it again"
    )


def _read_kimi(model: str, ranks: Path) -> PreTrainedTokenizerFast:
    config = find_file(model, "tokenizer_config.json", needed=True)
    if config is None:
        raise InputError(
            f"{model} has {_RANKS} and no tokenizer_config.json; copy it from the model's"
            " repository"
        )
    return build_kimi_tokenizer(ranks, config, find_file(model, "chat_template.jinja", needed=True))
