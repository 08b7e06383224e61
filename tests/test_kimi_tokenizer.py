"""Kimi's own tokenizer files against the tiktoken package."""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

import pytest
import tiktoken
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from unispec.checkpoints.tokenizer import read_tokenizer
from unispec.errors import InputError

HAN = r"[\p{Han}]+"
# tokenization_kimi.py, written down once more.
PATTERN = "|".join(
    [
        HAN,
        r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]*"
        r"[\p{Ll}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?",
        r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]+"
        r"[\p{Ll}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?",
        r"\p{N}{1,3}",
        r" ?[^\s\p{L}\p{N}]+[\r\n]*",
        r"\s*[\r\n]+",
        r"\s+(?!\S)",
        r"\s+",
    ]
)
NAMED = {0: "[BOS]", 1: "[EOS]", 2: "<|im_end|>", 21: "<|media_pad|>", 255: "[PAD]"}
"""Special tokens by their distance from the last rank."""

SAID = "<|tool|>"
"""A named token, at distance 5, that is no special one: decoding keeps it."""

TEXTS = [
    "The quick brown fox doesn't jump over 1234567 lazy dogs; they're HERE, aren't THEY'RE?",
    "中文English混合 北京市 Pascal 汉字abc。你好\uff0c世界\uff01 你好世界",
    "def f(x):\n    return x + 1\r\n\n\n\tprint( f(2) )   \n",
    "  leading and trailing   ",
    "naïve café Ünïcödé ÀÉ Привет, мир! 日本語のテスト ありがとう 한국어 שלום مرحبا",
    "🙂🙃 e\u0301 \u200d \ufeff 12,345.67 x²+y³ ½ Ⅻ",
    "",
    "'S 's 'Ll I'LL ǅ ʰ ª",
]


def ranks() -> dict[bytes, int]:
    """A small vocabulary learnt from the texts, in tiktoken's form."""
    learnt = Tokenizer(models.BPE())
    learnt.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=700, initial_alphabet=alphabet, show_progress=False)
    learnt.train_from_iterator(TEXTS * 3, trainer)
    letters = {letter: bytes([byte]) for byte, letter in byte_letters().items()}
    vocabulary = learnt.get_vocab()
    tokens = sorted(vocabulary, key=vocabulary.__getitem__)
    return {b"".join(letters[one] for one in token): i for i, token in enumerate(tokens)}


def byte_letters() -> dict[int, str]:
    """GPT-2's letter of each byte: itself where it can be seen, U+0100 and on for the others."""
    seen = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in seen]
    return {byte: chr(byte) for byte in seen} | {b: chr(256 + i) for i, b in enumerate(others)}


def write(folder: Path, found: dict[bytes, int], **changes: Any) -> Path:
    lines = (f"{base64.b64encode(token).decode()} {rank}\n" for token, rank in found.items())
    (folder / "tiktoken.model").write_text("".join(lines))
    first = len(found)
    named = {first + place: {"content": text, "special": True} for place, text in NAMED.items()}
    config = {
        "added_tokens_decoder": named | {first + 5: {"content": SAID, "special": False}},
        "auto_map": {"AutoTokenizer": ["tokenization_kimi.TikTokenTokenizer", None]},
        "tokenizer_class": "TikTokenTokenizer",
        "bos_token": "[BOS]",
        "eos_token": {"content": "[EOS]", "special": True},
        "pad_token": "[PAD]",
        "unk_token": None,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config | changes))
    (folder / "chat_template.jinja").write_text(
        "{% for m in messages %}{{ m.content }}<|im_end|>{% endfor %}"
    )
    return folder


@pytest.fixture(scope="module")
def found() -> dict[bytes, int]:
    return ranks()


@pytest.fixture(scope="module")
def ours(found: dict[bytes, int], tmp_path_factory: pytest.TempPathFactory) -> Any:
    return read_tokenizer(str(write(tmp_path_factory.mktemp("kimi"), found)), "kimi_k25")


@pytest.fixture(scope="module")
def theirs(found: dict[bytes, int]) -> tiktoken.Encoding:
    first = len(found)
    special = {NAMED.get(i, f"<|reserved_token_{first + i}|>"): first + i for i in range(256)}
    special[SAID] = special.pop(f"<|reserved_token_{first + 5}|>")
    return tiktoken.Encoding("kimi", pat_str=PATTERN, mergeable_ranks=found, special_tokens=special)


@pytest.mark.parametrize("text", [*TEXTS, "a<|im_end|>b<|media_pad|>[EOS]<|tool|> c", "[BOS"])
def test_texts(text: str, ours: Any, theirs: tiktoken.Encoding) -> None:
    expected = theirs.encode(text, allowed_special="all")
    assert ours.encode(text) == expected
    assert ours.decode(expected) == text


@settings(max_examples=300, deadline=None)
@given(st.text(max_size=60))
def test_any_text(ours: Any, theirs: tiktoken.Encoding, text: str) -> None:
    assert ours.encode(text) == theirs.encode(text, disallowed_special=())


@settings(max_examples=300, deadline=None)
@given(st.lists(st.sampled_from([*" \n\r\tabI'sT12中文あ.,-é", "the", "  ", "<|"]), max_size=30))
def test_texts_of_what_the_pattern_is_about(
    ours: Any, theirs: tiktoken.Encoding, parts: list[str]
) -> None:
    text = "".join(parts)
    assert ours.encode(text) == theirs.encode(text, disallowed_special=())


@pytest.mark.parametrize(
    ("text", "pieces"),
    [
        # What moonshotai's tokenizer makes of them, as other implementations test it.
        ("中文English混合", ["中文", "English", "混合"]),
        ("汉字abc", ["汉字", "abc"]),
        ("北京市 Pascal", ["北京市", " Pascal"]),
    ],
)
def test_chinese_is_split_from_other_letters(text: str, pieces: list[str], ours: Any) -> None:
    split = ours.backend_tokenizer.pre_tokenizer.pre_tokenize_str(text)
    assert [text[start:end] for _, (start, end) in split] == pieces


def test_named_tokens(ours: Any, found: dict[bytes, int]) -> None:
    first = len(found)
    assert isinstance(ours, PreTrainedTokenizerFast)
    assert [ours.bos_token_id, ours.eos_token_id, ours.pad_token_id] == [
        first,
        first + 1,
        first + 255,
    ]
    assert ours.unk_token is None
    assert len(ours) == first + 256
    assert ours.decode([first + 2, first + 5, found[b"A"]], skip_special_tokens=True) == SAID + "A"
    message = [{"role": "user", "content": "hi"}]
    assert ours.apply_chat_template(message, tokenize=False) == "hi<|im_end|>"


def test_tokenizer_json_comes_first(found: dict[bytes, int], ours: Any, tmp_path: Path) -> None:
    write(tmp_path, found)
    ours.save_pretrained(tmp_path)
    ours.backend_tokenizer.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tiktoken.model").write_text("damaged")
    assert read_tokenizer(str(tmp_path), "kimi_k25").encode(TEXTS[1]) == ours.encode(TEXTS[1])


def test_damaged_files(found: dict[bytes, int], tmp_path: Path) -> None:
    def refused(*parts: str) -> None:
        with pytest.raises(InputError) as error:
            read_tokenizer(str(tmp_path), "kimi_k25")
        assert all(part in str(error.value) for part in parts), error.value

    refused(str(tmp_path), "neither tokenizer.json", "tiktoken.model", "copy")
    model = write(tmp_path, found) / "tiktoken.model"
    text = model.read_text()
    model.write_text(text + "not base64\n")
    refused("tiktoken.model", f"line {len(found) + 1}", "not base64", "download")
    model.write_text(text.replace("\n", " 7\n", 1))
    refused("tiktoken.model", "line 1", "download")
    model.write_text("".join([*text.splitlines(keepends=True)[:-2], "YWJjZGVm 5000\n"]))
    refused("tiktoken.model", "ranks", "download")
    model.write_text("")
    refused("tiktoken.model", "256", "download")
    outside = {str(len(found) + 256): {"content": "<|late|>", "special": True}}
    write(tmp_path, found, added_tokens_decoder=outside)
    refused("tokenizer_config.json", "<|late|>", str(len(found) + 256))
    (tmp_path / "tokenizer_config.json").write_text("{")
    refused("tokenizer_config.json", "JSON", "download")
    (tmp_path / "tokenizer_config.json").write_text("[]")
    refused("tokenizer_config.json", "object", "download")
