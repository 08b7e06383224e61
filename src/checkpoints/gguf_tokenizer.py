"""The byte-level BPE tokenizer that a GGUF file describes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import IntEnum
from typing import Final

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors

from unispec.checkpoints.gguf_metadata import Metadata
from unispec.errors import InputError

__all__ = ["build_tokenizer"]

_TOKENIZER_MODEL: Final = "gpt2"
# The split of Llama 3's tokenizer.json.
_LLAMA3_SPLIT: Final = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


class _TokenType(IntEnum):
    """Values of `tokenizer.ggml.token_type` that matter to byte-level BPE."""

    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4


@dataclass(frozen=True)
class _PreTokenizer:
    """What llama.cpp's name of a pre-tokenizer (`tokenizer.ggml.pre`) stands for."""

    steps: tuple[pre_tokenizers.PreTokenizer, ...]
    ignore_merges: bool
    adds_bos: bool


_SMOLLM: Final = _PreTokenizer(
    steps=(
        pre_tokenizers.Digits(individual_digits=True),
        pre_tokenizers.ByteLevel(add_prefix_space=False),
    ),
    ignore_merges=False,
    adds_bos=False,
)
_LLAMA3: Final = _PreTokenizer(
    steps=(
        pre_tokenizers.Split(Regex(_LLAMA3_SPLIT), behavior="isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ),
    ignore_merges=True,
    adds_bos=True,
)
_PRE_TOKENIZERS: Final[Mapping[str, _PreTokenizer]] = {
    "smollm": _SMOLLM,
    "llama-bpe": _LLAMA3,
    "llama3": _LLAMA3,
    "llama-v3": _LLAMA3,
}


def build_tokenizer(metadata: Metadata) -> Tokenizer:
    """Builds the tokenizer of a GGUF file.

    Ids are the indices of `tokenizer.ggml.tokens`. Control tokens in a text are
    recognised and are left out when special tokens are skipped in decoding; user
    defined tokens are recognised and stay. A byte that the vocabulary lacks is
    dropped, as llama.cpp does. The BOS token is put in front where the file, or
    failing that the custom of its pre-tokenizer, says so.

    Raises:
        InputError: the tokenizer is no byte-level BPE, its pre-tokenizer is
            unknown, or its lists contradict each other.
    """
    path = metadata.path
    model = metadata.text("tokenizer.ggml.model")
    if model != _TOKENIZER_MODEL:
        raise InputError(
            f"{path} has a tokenizer of model {model!r} and only {_TOKENIZER_MODEL!r} (byte-level"
            " BPE) is supported: use a folder with the model's own config.json and tokenizer.json"
        )
    pre_name = metadata.text("tokenizer.ggml.pre")
    if pre_name not in _PRE_TOKENIZERS:
        raise InputError(
            f"{path} has the pre-tokenizer {pre_name!r} and only"
            f" {', '.join(sorted(_PRE_TOKENIZERS))} are supported: use a folder with the model's"
            " own config.json and tokenizer.json"
        )
    pre = _PRE_TOKENIZERS[pre_name]
    tokens = metadata.array("tokenizer.ggml.tokens", str)

    tokenizer = Tokenizer(_bpe(metadata, tokens, ignore_merges=pre.ignore_merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(list(pre.steps))
    tokenizer.decoder = decoders.ByteLevel()
    byte_level = processors.ByteLevel(trim_offsets=False)
    tokenizer.post_processor = byte_level
    if metadata.flag("tokenizer.ggml.add_bos_token", default=pre.adds_bos):
        bos_id = metadata.integer("tokenizer.ggml.bos_token_id")
        bos = _token(metadata, tokens, bos_id)
        add_bos = processors.TemplateProcessing(
            single=f"{bos} $A", pair=f"{bos} $A {bos}:1 $B:1", special_tokens=[(bos, bos_id)]
        )
        tokenizer.post_processor = processors.Sequence([byte_level, add_bos])
    _add_recognised_tokens(tokenizer, metadata, tokens)
    return tokenizer


def _bpe(metadata: Metadata, tokens: list[str], *, ignore_merges: bool) -> models.BPE:
    vocabulary = {token: index for index, token in enumerate(tokens)}
    merges = []
    for line in metadata.array("tokenizer.ggml.merges", str):
        left, _, right = line.partition(" ")
        if not {left, right, left + right} <= vocabulary.keys():
            raise InputError(
                f"{metadata.path}: the merge {line!r} uses a token that tokenizer.ggml.tokens"
                " lacks: convert the model again"
            )
        merges.append((left, right))
    return models.BPE(vocab=vocabulary, merges=merges, ignore_merges=ignore_merges)


def _add_recognised_tokens(tokenizer: Tokenizer, metadata: Metadata, tokens: list[str]) -> None:
    """Makes the tokenizer find control and user defined tokens in a text."""
    kinds = metadata.array("tokenizer.ggml.token_type", int)
    if len(kinds) != len(tokens):
        raise InputError(
            f"{metadata.path}: tokenizer.ggml.token_type has {len(kinds)} items for {len(tokens)}"
            " tokens: convert the model again"
        )
    special_kinds = (_TokenType.UNKNOWN, _TokenType.CONTROL)
    added = [
        AddedToken(token, special=kind in special_kinds, normalized=False)
        for token, kind in zip(tokens, kinds, strict=True)
        if kind in (*special_kinds, _TokenType.USER_DEFINED)
    ]
    tokenizer.add_tokens(added)


def _token(metadata: Metadata, tokens: list[str], index: int) -> str:
    if not 0 <= index < len(tokens):
        raise InputError(
            f"{metadata.path}: tokenizer.ggml.bos_token_id is {index} and the vocabulary has"
            f" {len(tokens)} tokens: convert the model again"
        )
    return tokens[index]
