"""Streamed text: whole characters, nothing lost or doubled, cut before the first stop string."""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import product
from pathlib import Path
from string import ascii_lowercase

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny.tokenizer import write_tokenizer
from tokenizers import Tokenizer, decoders, models
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from unispec.engine.text_stream import TextStream

EOS = 2
BYTES = 259  # 3 special tokens and one token for each byte
PAIRS = 935  # also one for each pair of lower-case letters


@pytest.fixture(scope="module")
def by_bytes(tmp_path_factory: pytest.TempPathFactory) -> PreTrainedTokenizerFast:
    """A token for each byte."""
    return _tokenizer(tmp_path_factory.mktemp("bytes"), BYTES)


@pytest.fixture(scope="module")
def by_pairs(tmp_path_factory: pytest.TempPathFactory) -> PreTrainedTokenizerFast:
    """A token for each byte and for each pair of lower-case letters."""
    return _tokenizer(tmp_path_factory.mktemp("pairs"), PAIRS)


@pytest.fixture(scope="module")
def by_words() -> PreTrainedTokenizerFast:
    """Words in the manner of Llama 2: a blank is part of a word, the text's first is dropped."""
    words = ["<unk>", "<s>", "</s>", "\u2581to", "\u2581be", "<0xE2>", "<0x82>", "<0xAC>", "or"]
    vocabulary = {word: token for token, word in enumerate(words)}
    backend = Tokenizer(models.BPE(vocabulary, [], unk_token="<unk>", byte_fallback=True))
    backend.add_special_tokens(words[:3])
    backend.decoder = decoders.Sequence(
        [
            decoders.Replace("\u2581", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>", unk_token="<unk>")


def _tokenizer(folder: Path, vocab_size: int) -> PreTrainedTokenizerFast:
    write_tokenizer(folder, vocab_size)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert isinstance(tokenizer, PreTrainedTokenizerFast)
    return tokenizer


def encode(tokenizer: PreTrainedTokenizerFast, text: str) -> list[int]:
    """The tokens of ``text``."""
    return list(tokenizer(text, add_special_tokens=False).input_ids)


def stream(
    tokenizer: PreTrainedTokenizerFast, tokens: Sequence[int], stop: Sequence[str] = ()
) -> tuple[list[str], TextStream]:
    """Pushes the tokens up to a stop, then finishes; returns the pieces and the stream."""
    text = TextStream(tokenizer, stop)
    pieces = []
    for token in tokens:
        pieces.append(text.push(token))
        if text.stopped:
            break
    pieces.append(text.finish())
    return pieces, text


def cut(steps: Sequence[str], stop: Sequence[str]) -> tuple[str, bool]:
    """What of a text is left that arrives in ``steps``, and whether a stop string ended it."""
    text = ""
    for step in steps:
        text += step
        found = [match.start() for s in stop if (match := re.search(re.escape(s), text))]
        if found:
            return text[: min(found)], True
    return text, False


def test_a_character_arrives_whole(by_bytes: PreTrainedTokenizerFast) -> None:
    """The bytes of a character release nothing until the last of them."""
    tokens = encode(by_bytes, "a\u20acb\U0001f600")
    pieces, text = stream(by_bytes, tokens)
    assert pieces == ["a", "", "", "\u20ac", "b", "", "", "", "\U0001f600", ""]
    assert text.text == "a\u20acb\U0001f600"


def test_an_unfinished_character_comes_at_the_end(by_bytes: PreTrainedTokenizerFast) -> None:
    """Output that ends within a character shows that it does."""
    tokens = encode(by_bytes, "a\u20ac")[:-1]
    pieces, text = stream(by_bytes, tokens)
    assert pieces == ["a", "", "", "\N{REPLACEMENT CHARACTER}"]
    assert text.text == "a\N{REPLACEMENT CHARACTER}"


def test_a_broken_character_does_not_hold_up_the_text(by_bytes: PreTrainedTokenizerFast) -> None:
    """A character that never completes is released with the next whole one."""
    tokens = [*encode(by_bytes, "\u20ac")[:-1], *encode(by_bytes, "ab")]
    pieces, _ = stream(by_bytes, tokens)
    assert pieces == ["", "", "\N{REPLACEMENT CHARACTER}a", "b", ""]


def test_special_tokens_are_no_text(by_bytes: PreTrainedTokenizerFast) -> None:
    """An EOS token adds nothing, and text goes on after it."""
    pieces, _ = stream(by_bytes, [*encode(by_bytes, "hi"), EOS, *encode(by_bytes, " ho")])
    assert pieces == ["h", "i", "", " ", "h", "o", ""]


@given(text=st.text(max_size=40), eos_at=st.none() | st.integers(0, 40))
@settings(max_examples=150, deadline=None, derandomize=True)
def test_pieces_are_the_decoded_text(
    by_bytes: PreTrainedTokenizerFast, text: str, eos_at: int | None
) -> None:
    """Nothing is lost or doubled, whatever the characters are."""
    tokens = encode(by_bytes, text)
    if eos_at is not None:
        tokens.insert(eos_at, EOS)
    pieces, result = stream(by_bytes, tokens)
    decoded = by_bytes.decode(tokens, skip_special_tokens=True)
    assert "".join(pieces) == result.text == decoded
    if eos_at is None:
        assert decoded == text


@given(tokens=st.lists(st.integers(3, BYTES - 1), max_size=40))
@settings(max_examples=200, deadline=None, derandomize=True)
def test_any_bytes_decode_as_at_once(by_bytes: PreTrainedTokenizerFast, tokens: list[int]) -> None:
    """Bytes that are no text give the replacement characters that decoding at once gives."""
    pieces, result = stream(by_bytes, tokens)
    assert "".join(pieces) == result.text == by_bytes.decode(tokens)


def test_words_keep_their_blanks(by_words: PreTrainedTokenizerFast) -> None:
    """Only the blank that begins the whole text is dropped, special tokens or not."""
    for first, second, third in product((3, 4, 8), repeat=3):
        for tokens in ([first, second, third], [EOS, first, EOS, second, EOS, EOS, third]):
            pieces, _ = stream(by_words, tokens)
            assert "".join(pieces) == by_words.decode(tokens, skip_special_tokens=True)


def test_a_stop_string_cuts_the_text(by_bytes: PreTrainedTokenizerFast) -> None:
    """Neither the stop string nor what follows it is released."""
    pieces, text = stream(by_bytes, encode(by_bytes, "one END two"), ["END"])
    assert pieces == ["o", "n", "e", " ", "", "", "", ""]
    assert text.stopped
    assert text.text == "one "


def test_the_beginning_of_a_stop_string_is_held_back_and_released(
    by_bytes: PreTrainedTokenizerFast,
) -> None:
    """What might become a stop string waits until it cannot, or until the end."""
    pieces, text = stream(by_bytes, encode(by_bytes, "aENx ENEN"), ["END"])
    assert pieces == ["a", "", "", "ENx", " ", "", "", "EN", "", "EN"]
    assert not text.stopped
    assert text.text == "aENx ENEN"


def test_a_stop_string_within_a_token(by_pairs: PreTrainedTokenizerFast) -> None:
    """The text before it is released, the rest of the token is not."""
    tokens = encode(by_pairs, "abcd")
    assert len(tokens) == 2
    pieces, text = stream(by_pairs, tokens, ["c"])
    assert pieces == ["ab", "", ""]
    assert (text.text, text.stopped) == ("ab", True)


def test_the_stop_string_that_begins_first_counts(by_pairs: PreTrainedTokenizerFast) -> None:
    """One token completes two stop strings."""
    pieces, text = stream(by_pairs, encode(by_pairs, "xabcde"), ["d", "bcd"])
    assert "".join(pieces) == text.text == "xa"


def test_a_stop_string_of_several_bytes(by_bytes: PreTrainedTokenizerFast) -> None:
    """It is found when its last byte has come."""
    pieces, text = stream(by_bytes, encode(by_bytes, "5 \u20ac each"), [" \u20ac"])
    assert pieces == ["5", "", "", "", "", ""]
    assert (text.text, text.stopped) == ("5", True)


def test_an_empty_stop_string_stops_nothing(by_bytes: PreTrainedTokenizerFast) -> None:
    """Every text contains it, so it says nothing."""
    pieces, text = stream(by_bytes, encode(by_bytes, "ab"), [""])
    assert pieces == ["a", "b", ""]
    assert not text.stopped


@given(
    text=st.text("ab\u20ac", max_size=24),
    stop=st.lists(st.text("ab\u20ac", min_size=1, max_size=5), max_size=4),
)
@settings(max_examples=300, deadline=None, derandomize=True)
def test_stop_strings_by_bytes(
    by_bytes: PreTrainedTokenizerFast, text: str, stop: list[str]
) -> None:
    """The text ends before the first stop string that is complete, also among overlapping ones."""
    pieces, result = stream(by_bytes, encode(by_bytes, text), stop)
    assert ("".join(pieces), result.stopped) == cut(list(text), stop)
    assert result.text == "".join(pieces)


@given(
    text=st.text(ascii_lowercase[:3], max_size=24),
    stop=st.lists(st.text(ascii_lowercase[:3], min_size=1, max_size=4), min_size=1, max_size=3),
)
@settings(max_examples=300, deadline=None, derandomize=True)
def test_stop_strings_by_pairs(
    by_pairs: PreTrainedTokenizerFast, text: str, stop: list[str]
) -> None:
    """So it does where a token ends behind a stop string; and no more is held back than must be."""
    tokens = encode(by_pairs, text)
    steps = [by_pairs.decode([token]) for token in tokens]
    expected, stopped = cut(steps, stop)

    result = TextStream(by_pairs, stop)
    released = seen = ""
    for token, step in zip(tokens, steps, strict=True):
        released += result.push(token)
        seen += step
        if result.stopped:
            break
        held = seen[len(released) :]
        assert seen.startswith(released)
        assert not held or any(s.startswith(held) and s != held for s in stop)
    assert (released + result.finish(), result.stopped) == (expected, stopped)


def test_stop_strings_are_looked_for_behind_the_least_tokens(
    by_bytes: PreTrainedTokenizerFast,
) -> None:
    """Those that begin before are text, also where they end behind."""
    text = "xab ab ab"
    for least, expected in ((0, "x"), (1, "x"), (2, "xab "), (3, "xab "), (5, "xab ab ")):
        found = TextStream(by_bytes, ["ab"], min_tokens=least)
        pieces = ""
        for token in encode(by_bytes, text):
            pieces += found.push(token)
            if found.stopped:
                break
        assert (pieces, found.stopped) == (expected, True), least
