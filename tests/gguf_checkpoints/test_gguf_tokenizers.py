"""Tokenizers of GGUF files, held against llama.cpp's rules."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from gguf_files import refused, write_gguf
from tokenizers import Tokenizer

from unispec.checkpoints import read_gguf


def tiny_tokenizer(path: Path, **arguments: Any) -> Tokenizer:
    return read_gguf(write_gguf(path, **arguments)).tokenizer()


def test_smollm_splits_every_digit(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer(tmp_path / "a.gguf")
    pieces = tokenizer.pre_tokenizer.pre_tokenize_str("It's  12\n I'LL")
    assert [piece for piece, _ in pieces] == ["It", "'s", "ĠĠ", "1", "2", "Ċ", "ĠI", "'", "LL"]


def test_llama3_splits_digits_by_three_and_contractions_in_any_case(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer(tmp_path / "a.gguf", pre="llama-bpe")
    pieces = tokenizer.pre_tokenizer.pre_tokenize_str("I'LL pay $1234567!\n\n  ok")
    assert [piece for piece, _ in pieces] == [
        *("I", "'LL", "Ġpay", "Ġ$", "123", "456", "7", "!ĊĊ", "Ġ", "Ġok")
    ]


@pytest.mark.parametrize(
    ("pre", "add_bos", "expected"),
    [
        ("smollm", None, False),
        ("smollm", True, True),
        ("llama-bpe", None, True),
        ("llama3", False, False),
    ],
)
def test_bos_is_added_where_the_file_says_so(
    tmp_path: Path, pre: str, add_bos: bool | None, expected: bool
) -> None:
    tokenizer = tiny_tokenizer(
        tmp_path / "a.gguf", pre=pre, metadata={"tokenizer.ggml.add_bos_token": add_bos}
    )
    assert tokenizer.encode(" the").ids == ([256] if expected else []) + [261]
    assert tokenizer.encode(" the", add_special_tokens=False).ids == [261]


def test_llama3_takes_whole_words_of_the_vocabulary_without_merges(tmp_path: Path) -> None:
    no_merges = {"tokenizer.ggml.merges": ["Ġ t"]}
    whole = tiny_tokenizer(tmp_path / "a.gguf", pre="llama-bpe", metadata=no_merges)
    merged = tiny_tokenizer(tmp_path / "b.gguf", pre="smollm", metadata=no_merges)
    assert whole.encode(" the", add_special_tokens=False).tokens == ["Ġthe"]
    assert merged.encode(" the").tokens == ["Ġt", "h", "e"]


def test_control_tokens_are_skipped_and_user_defined_ones_stay(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer(tmp_path / "a.gguf")
    ids = tokenizer.encode("x<tool> the<eos>").ids
    assert ids == [tokenizer.token_to_id("x"), 258, 261, 257]
    assert tokenizer.decode(ids) == "x<tool> the"
    assert tokenizer.decode(ids, skip_special_tokens=False) == "x<tool> the<eos>"


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        ({"tokenizer_model": "llama"}, ["'llama'", "gpt2", "tokenizer.json"]),
        ({"pre": "qwen2"}, ["'qwen2'", "llama-bpe", "smollm"]),
        ({"metadata": {"tokenizer.ggml.merges": ["Ġ q"]}}, ["'Ġ q'"]),
        ({"metadata": {"tokenizer.ggml.token_type": [1, 1]}}, ["2 items", "262 tokens"]),
        ({"metadata": {"tokenizer.ggml.tokens": None}}, ["no metadata key", "tokens"]),
        (
            {
                "metadata": {
                    "tokenizer.ggml.add_bos_token": True,
                    "tokenizer.ggml.bos_token_id": 900,
                }
            },
            ["bos_token_id is 900", "262"],
        ),
    ],
)
def test_bad_tokenizer(tmp_path: Path, arguments: dict[str, Any], parts: list[str]) -> None:
    checkpoint = read_gguf(write_gguf(tmp_path / "a.gguf", **arguments))
    with refused("a.gguf", *parts):
        checkpoint.tokenizer()
