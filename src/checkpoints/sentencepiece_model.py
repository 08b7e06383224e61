"""`tokenizer.model`, the file of SentencePiece, as a tokenizer of `tokenizers`.

The file is one protobuf message; https://github.com/google/sentencepiece says in
`sentencepiece_model.proto` what its numbered fields mean. Read here, because the packages that
read it ask for a newer protobuf than MAX allows.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path
from typing import Final

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers

from unispec.errors import InputError

__all__ = ["read_sentencepiece"]

_BLANK: Final = "\u2581"
"""How pieces write a blank."""

_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5


class _Type(IntEnum):
    """What a piece is."""

    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


@dataclass(frozen=True)
class _Piece:
    text: str
    score: float
    type: _Type


def read_sentencepiece(path: Path, *, legacy: bool = True) -> Tokenizer:
    """The tokenizer of a BPE model with byte fallback, as Llama 2 and its fine-tunes have.

    Args:
        path: `tokenizer.model`.
        legacy: of tokenizer_config.json: whether the text after a special token begins with a
            blank, too, as the text's first word does.

    Raises:
        InputError: the file is damaged, or its model is of another kind.
    """
    try:
        pieces, trainer, normalizer = _read_model(path.read_bytes())
    except (struct.error, ValueError, LookupError) as error:
        raise InputError(
            f"{path} is no SentencePiece model ({error}): download it again, or add a"
            " tokenizer.json"
        ) from error
    other = _what_is_other(pieces, trainer, normalizer)
    if other:
        raise InputError(
            f"{path} cannot be converted: {other}; add the tokenizer.json of this tokenizer"
        )
    ids = {piece.text: number for number, piece in enumerate(pieces)}
    unknown = next(piece.text for piece in pieces if piece.type == _Type.UNKNOWN)
    tokenizer = Tokenizer(
        models.BPE(
            vocab=ids,
            merges=_merges(pieces),
            unk_token=unknown,
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    begins_with_blank = normalizer.get(3, True)
    if legacy:
        blanks = [normalizers.Replace(" ", _BLANK)]
        first = [normalizers.Prepend(_BLANK)] if begins_with_blank else []
        tokenizer.normalizer = normalizers.Sequence([*first, *blanks])
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(
            replacement=_BLANK,
            prepend_scheme="first" if begins_with_blank else "never",
            split=False,
        )
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace(_BLANK, " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            *([decoders.Strip(" ", 1, 0)] if begins_with_blank else []),
        ]
    )
    special = (_Type.UNKNOWN, _Type.CONTROL)
    tokenizer.add_tokens(
        [
            AddedToken(piece.text, special=piece.type in special, normalized=False)
            for piece in pieces
            if piece.type in (*special, _Type.USER_DEFINED)
        ]
    )
    return tokenizer


_Fields = dict[int, "int | float | bytes"]


def _read_model(data: bytes) -> tuple[list[_Piece], _Fields, _Fields]:
    """Pieces, and what the messages TrainerSpec and NormalizerSpec state."""
    pieces = []
    trainer: _Fields = {}
    normalizer: _Fields = {}
    for number, value in _fields(data):
        if number > 3:
            continue
        if not isinstance(value, bytes):
            raise ValueError(f"field {number} is no message")
        stated = dict(_fields(value))
        if number == 1:
            text = stated.get(1)
            if not isinstance(text, bytes):
                raise ValueError("it has a piece without text")
            kind = _Type(int(stated.get(3, _Type.NORMAL)))
            pieces.append(_Piece(text.decode(), float(stated.get(2, 0.0)), kind))
        elif number == 2:
            trainer = stated
        else:
            normalizer = stated
    if not pieces:
        raise ValueError("it has no pieces")
    return pieces, trainer, normalizer


def _fields(data: bytes) -> Iterator[tuple[int, int | float | bytes]]:
    """A message's fields by their numbers, in the file's order."""
    at = 0
    while at < len(data):
        key, at = _varint(data, at)
        number, wire = key >> 3, key & 7
        if wire == _VARINT:
            value, at = _varint(data, at)
            yield number, value
        elif wire == _BYTES:
            length, at = _varint(data, at)
            if at + length > len(data):
                raise ValueError("it ends in the middle of a field")
            yield number, data[at : at + length]
            at += length
        elif wire in (_FIXED32, _FIXED64):
            form, width = ("<f", 4) if wire == _FIXED32 else ("<d", 8)
            yield number, struct.unpack_from(form, data, at)[0]
            at += width
        else:
            raise ValueError(f"it has a field of wire type {wire}")


def _varint(data: bytes, at: int) -> tuple[int, int]:
    """A number in groups of seven bits, and where it ends."""
    value = 0
    for shift in range(0, 70, 7):
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
    raise ValueError("it has a number of more than 64 bits")


def _what_is_other(pieces: list[_Piece], trainer: _Fields, normalizer: _Fields) -> str | None:
    """Names what this converter does not know of the model, if anything."""
    types = [piece.type for piece in pieces]
    if trainer.get(3, 1) != 2:
        return "its model is no BPE"
    if not trainer.get(35, False) or types.count(_Type.BYTE) != 256:
        return "it has no tokens for single bytes"
    if types.count(_Type.UNKNOWN) != 1 or _Type.UNUSED in types:
        return "it has unused tokens, or not one unknown token"
    if len({piece.text for piece in pieces}) != len(pieces):
        return "two of its tokens are the same"
    if normalizer.get(2) or normalizer.get(4, True) or not normalizer.get(5, True):
        return "it rewrites the text's characters or blanks"
    if trainer.get(24, False):
        return "its words end with a blank"
    return None


def _merges(pieces: list[_Piece]) -> list[tuple[str, str]]:
    """Pairs in the order in which they are joined: what becomes the best piece comes first."""
    normal = {piece.text: piece.score for piece in pieces if piece.type == _Type.NORMAL}
    # Sorting is stable: pieces of one score stay in the file's order.
    return [
        (text[:cut], text[cut:])
        for text in sorted(normal, key=normal.__getitem__, reverse=True)
        for cut in range(1, len(text))
        if text[:cut] in normal and text[cut:] in normal
    ]
