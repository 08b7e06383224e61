"""Kimi's own tokenizer files against the tiktoken package."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tiktoken
from hub import Hub, running_hub
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny.kimi import tiny_kimi
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from unispec.chat import encode_message
from unispec.checkpoints.repository import find_file
from unispec.checkpoints.tokenizer import read_tokenizer
from unispec.engine import Engine, EngineConfig
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

CHAT_TEMPLATE = (
    "{% for m in messages %}é:{% if m.content is string %}{{ m.content }}{% else %}"
    "{% for part in m.content %}"
    "{% if part.type == 'image' %}<|media_pad|>{% else %}{{ part.text }}{% endif %}"
    "{% endfor %}{% endif %}<|im_end|>{% endfor %}"
)

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
    trainer = trainers.BpeTrainer(vocab_size=500, initial_alphabet=alphabet, show_progress=False)
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
    (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE, encoding="utf-8")
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


PARTS = [*" \n\r\tabI'sT12中文あ.,-é\u0301ǅʰ", "the", "  ", "<|"]


@pytest.mark.parametrize("text", TEXTS)
def test_pieces(text: str, ours: Any) -> None:
    assert pieces(ours, text) == tiktokens_pieces(text)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.sampled_from(PARTS), max_size=20).map("".join))
def test_pieces_of_what_the_pattern_is_about(ours: Any, text: str) -> None:
    assert pieces(ours, text) == tiktokens_pieces(text)


def pieces(tokenizer: Any, text: str) -> list[str]:
    split = tokenizer.backend_tokenizer.pre_tokenizer.pre_tokenize_str(text)
    return [text[start:end] for _, (start, end) in split]


def tiktokens_pieces(text: str) -> list[str]:
    """Tokens may agree where pieces do not; a vocabulary of all substrings shows the pieces."""
    whole = {bytes([byte]) for byte in range(256)}
    whole |= {text[i:j].encode() for i in range(len(text)) for j in range(i + 1, len(text) + 1)}
    numbered = {token: rank for rank, token in enumerate(sorted(whole, key=lambda t: (len(t), t)))}
    shown = tiktoken.Encoding(
        "pieces", pat_str=PATTERN, mergeable_ranks=numbered, special_tokens={}
    )
    return [shown.decode([token]) for token in shown.encode(text, disallowed_special=())]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        # What moonshotai's tokenizer makes of them, as other implementations test it.
        ("中文English混合", ["中文", "English", "混合"]),
        ("汉字abc", ["汉字", "abc"]),
        ("北京市 Pascal", ["北京市", " Pascal"]),
    ],
)
def test_chinese_is_split_from_other_letters(text: str, expected: list[str], ours: Any) -> None:
    assert pieces(ours, text) == expected


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
    assert ours.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False) == (
        "é:hi<|im_end|>"
    )


def test_images_of_a_message_have_their_placeholders(
    ours: Any, theirs: tiktoken.Encoding, found: dict[bytes, int]
) -> None:
    parts = [{"type": "image"}, {"type": "image"}, {"type": "text", "text": "What changed?"}]
    tokens = encode_message(ours, parts)
    said = "é:<|media_pad|><|media_pad|>What changed?<|im_end|>"
    assert tokens == theirs.encode(said, allowed_special="all")
    assert tokens.count(len(found) + 21) == 2


def test_the_engine_reads_them(found: dict[bytes, int], ours: Any, tmp_path: Path) -> None:
    folder = write(tiny_kimi(tmp_path), found)
    (folder / "tokenizer.json").unlink()
    engine = Engine(EngineConfig(model=str(folder), max_length=64))
    assert engine.tokenizer.encode(TEXTS[1]) == ours.encode(TEXTS[1])


def test_they_come_before_a_tokenizer_json(
    found: dict[bytes, int], ours: Any, tmp_path: Path
) -> None:
    """Beside which their tokenizer_config.json asks transformers for code that is not run."""
    write(tmp_path, found)
    ours.backend_tokenizer.save(str(tmp_path / "tokenizer.json"))
    assert read_tokenizer(str(tmp_path), "kimi_k25").encode(TEXTS[1]) == ours.encode(TEXTS[1])


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    """A hub with the repository them/kimi, whose folder is `tmp_path / "kimi"`."""
    with running_hub(monkeypatch, tmp_path / "cache") as running:
        (tmp_path / "kimi").mkdir()
        running.repositories["them/kimi"] = tmp_path / "kimi"
        yield running


def test_a_repository(found: dict[bytes, int], ours: Any, tmp_path: Path, hub: Hub) -> None:
    write(tmp_path / "kimi", found)
    tokenizer = read_tokenizer("them/kimi", "kimi_k25")
    assert tokenizer.encode(TEXTS[1]) == ours.encode(TEXTS[1])
    assert tokenizer.chat_template == CHAT_TEMPLATE


def test_a_repository_without_a_template(found: dict[bytes, int], tmp_path: Path, hub: Hub) -> None:
    write(tmp_path / "kimi", found)
    (tmp_path / "kimi" / "chat_template.jinja").unlink()
    assert read_tokenizer("them/kimi", "kimi_k25").chat_template is None


def test_a_file_that_the_hub_does_not_give_is_not_taken_for_missing(
    found: dict[bytes, int], tmp_path: Path, hub: Hub
) -> None:
    write(tmp_path / "kimi", found)
    for name in ("tiktoken.model", "tokenizer_config.json"):
        find_file("them/kimi", name)
    hub.go_down()
    message = r"them/kimi .* does not give its chat_template.jinja .*check the path and the network"
    with pytest.raises(InputError, match=message):
        read_tokenizer("them/kimi", "kimi_k25")


NAMES: dict[str, Any] = {"bos_token": None, "eos_token": None, "pad_token": None}


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        ({"added_tokens_decoder": None}, ["cannot be used", "download"]),
        ({"added_tokens_decoder": []}, ["cannot be used", "download"]),
        ({"added_tokens_decoder": {"first": {"content": "x"}}}, ["'first'", "download"]),
        ({"added_tokens_decoder": {"500": {"special": True}}}, ["'content'", "download"]),
        ({"added_tokens_decoder": {"500": "x"}}, ["cannot be used", "download"]),
        ({"added_tokens_decoder": {"756": {"content": "<|late|>"}}}, ["<|late|>", "756", "755"]),
        ({"added_tokens_decoder": {"5": {"content": "<|early|>"}}}, ["<|early|>", "id 5", "500"]),
        (
            {"added_tokens_decoder": {"500": {"content": "x|"}, "501": {"content": "x|"}}},
            ["'x|' of id 501", "another"],
        ),
        ({"added_tokens_decoder": {"500": {"content": ""}}}, ["'' of id 500", "another"]),
        ({"added_tokens_decoder": {"500": {"content": "a"}}}, ["'a' of id 500", "another"]),
        ({"eos_token": "[NOPE]"}, ["eos_token '[NOPE]'", "no token", "download"]),
        ({"eos_token": {"special": True}}, ["'content'", "download"]),
        ({"eos_token": 5}, ["5 is no token", "download"]),
    ],
)
def test_a_config_that_does_not_fit_is_refused(
    changes: dict[str, Any], parts: list[str], found: dict[bytes, int], tmp_path: Path
) -> None:
    assert len(found) == 500
    names = NAMES if "added_tokens_decoder" in changes else {}
    write(tmp_path, found, **names | changes)
    with pytest.raises(InputError) as error:
        read_tokenizer(str(tmp_path), "kimi_k25")
    for part in ["tokenizer_config.json", *parts]:
        assert part in str(error.value)


def test_damaged_files(found: dict[bytes, int], tmp_path: Path) -> None:
    def refused(*parts: str) -> None:
        with pytest.raises(InputError) as error:
            read_tokenizer(str(tmp_path), "kimi_k25")
        assert all(part in str(error.value) for part in parts), error.value

    refused(str(tmp_path), "no tokenizer.json", "copy")
    model = write(tmp_path, found) / "tiktoken.model"
    text = model.read_text()
    model.write_text(text + "\n")
    assert len(read_tokenizer(str(tmp_path), "kimi_k25")) == len(found) + 256
    model.write_text(text + "not base64\n")
    refused("tiktoken.model", f"line {len(found) + 1}", "not base64", "download")
    model.write_text(text.replace("\n", " 7\n", 1))
    refused("tiktoken.model", "line 1", "download")
    model.write_text("".join([*text.splitlines(keepends=True)[:-2], "YWJjZGVm 5000\n"]))
    refused("tiktoken.model", "ranks", "download")
    model.write_text("")
    refused("tiktoken.model", "256", "download")
    model.write_text(text)
    config = tmp_path / "tokenizer_config.json"
    for content in ("{", "[]"):
        config.write_text(content)
        refused("tokenizer_config.json", "download")
    config.unlink()
    refused("tiktoken.model and no tokenizer_config.json", "copy")
    write(tmp_path, found)
    (tmp_path / "chat_template.jinja").write_bytes(b"\xe9")
    refused("chat_template.jinja", "download")
