"""Masks of allowed tokens: along a text, along drafts, and where a text may end."""

from __future__ import annotations

import itertools
import json
import random
import re
import string

import jsonschema
import numpy as np
import numpy.typing as npt
import pytest
from grammar_states import EOS, REGEXES, VOCAB, WORDS, allowed, fast, fill, regex, tokens_of
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from unispec.sampling.grammar import Grammar, GrammarCompiler

SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 6},
        "kind": {"enum": ["cat", "dog", 7, None]},
        "age": {"type": "integer", "minimum": 0, "maximum": 120},
        "share": {"type": "number", "minimum": 0, "maximum": 1},
        "tags": {"type": "array", "items": {"type": "boolean"}, "minItems": 1, "maxItems": 3},
        "at": {
            "type": "object",
            "properties": {"day": {"type": "string", "format": "date"}},
            "additionalProperties": False,
        },
    },
    "required": ["name", "age", "tags"],
    "additionalProperties": False,
}


def matches(pattern: str, text: bytes) -> bool:
    try:
        return re.fullmatch(pattern, text.decode()) is not None
    except UnicodeDecodeError:
        return False


@pytest.mark.parametrize("pattern", REGEXES)
@pytest.mark.parametrize("seed", range(8))
def test_regex_walk(
    compiler: GrammarCompiler,
    eos: int,
    token_bytes: dict[int, bytes],
    pattern: str,
    seed: int,
) -> None:
    choose = random.Random(seed)
    state = regex(compiler, pattern)
    text = b""
    for _ in range(200):
        tokens = allowed(state)
        assert (eos in tokens) == matches(pattern, text), text
        assert state.is_complete == (tokens == {eos})
        token = choose.choice(sorted(tokens))
        state.accept(token)
        if token == eos:
            break
        text += token_bytes[token]
    assert token == eos
    assert matches(pattern, text)
    assert state.is_complete
    assert allowed(state) == {eos}


@pytest.mark.parametrize("seed", range(24))
def test_json_walk(
    compiler: GrammarCompiler, eos: int, token_bytes: dict[int, bytes], seed: int
) -> None:
    choose = random.Random(seed)
    state = compiler.compile(Grammar("json_schema", json.dumps(SCHEMA))).start()
    text = b""
    while not state.is_complete and len(text) < 2000:
        tokens = allowed(state)
        assert eos not in tokens
        token = choose.choice(sorted(tokens))
        state.accept(token)
        text += token_bytes[token]
    assert allowed(state) == {eos}
    jsonschema.validate(
        json.loads(text), SCHEMA, format_checker=jsonschema.Draft202012Validator.FORMAT_CHECKER
    )


def test_every_allowed_token_and_no_other(
    compiler: GrammarCompiler, eos: int, token_bytes: dict[int, bytes]
) -> None:
    """Against the whole of a finite language, at every text on the way to its words."""
    stems = [b"the fox", b"the dog", b"no", "é".encode()]
    words = [stem + end for stem in stems for end in (b"", b"12", b"21")]
    seen = {b""}
    paths: list[list[int]] = [[]]
    choices = 0
    while paths:
        path = paths.pop()
        text = b"".join(token_bytes[token] for token in path)
        state = regex(compiler, "(the fox|the dog|no|é)(12|21)?")
        for token in path:
            state.accept(token)
        tokens = allowed(state)
        viable = {
            token
            for token, piece in token_bytes.items()
            if any(word.startswith(text + piece) for word in words)
        }
        next_bytes = {word[len(text)] for word in words if word.startswith(text) and word != text}
        assert (eos in tokens) == (text in words)
        if len(next_bytes) == 1 and text not in words:  # only one continuation: its canonical token
            assert tokens
            assert tokens <= viable
        else:
            assert tokens - {eos} == viable
            choices += 1
        for token in tokens - {eos}:
            longer = text + token_bytes[token]
            if longer not in seen:
                seen.add(longer)
                paths.append([*path, token])
    assert seen.issuperset(words)
    assert choices > len(words)


@pytest.mark.parametrize("pattern", REGEXES)
@pytest.mark.parametrize("count", [1, 3, 5])
def test_rows_equal_accepting_one_by_one(
    compiler: GrammarCompiler, eos: int, pattern: str, count: int
) -> None:
    choose = random.Random(count)
    for _ in range(6):
        start = [regex(compiler, pattern) for _ in range(2)]
        for state in start:
            state.accept(min(allowed(state) - {eos}))
        state, follower = start
        drafts = []
        rows = [fill(follower, [])[0]]
        for _ in range(count):
            drafts.append(choose.choice(sorted(tokens_of(rows[-1]))))
            follower.accept(drafts[-1])
            rows.append(fill(follower, [])[0])
        np.testing.assert_array_equal(fill(state, drafts), rows)
        np.testing.assert_array_equal(fill(state, drafts), rows)
        np.testing.assert_array_equal(fill(state, []), rows[:1])
        for draft, row in zip(drafts, rows[1:], strict=True):
            state.accept(draft)
            np.testing.assert_array_equal(fill(state, [])[0], row)


def test_rows_of_json_after_a_long_text(
    compiler: GrammarCompiler, tokenizer: PreTrainedTokenizerFast, eos: int
) -> None:
    text = '{"name": "Ann", "kind": "cat", "age": 34, "tags": [true, false]}'
    compiled = compiler.compile(Grammar("json_schema", json.dumps(SCHEMA)))
    ids = tokenizer.encode(text, add_special_tokens=False)
    state = compiled.start()
    follower = compiled.start()
    rows = []
    for token in [*ids, eos]:
        rows.append(fill(follower, [])[0])
        assert token in tokens_of(rows[-1])
        follower.accept(token)
    for start in range(len(ids) - 4):
        np.testing.assert_array_equal(fill(state, ids[start : start + 4]), rows[start : start + 5])
        state.accept(ids[start])


@pytest.mark.parametrize("wrong", ["outside", "void", "no token", "beyond", "early eos"])
def test_draft_that_is_not_allowed(
    compiler: GrammarCompiler, token_bytes: dict[int, bytes], eos: int, wrong: str
) -> None:
    token_of = {piece: token for token, piece in token_bytes.items()}
    digit = token_of[b"7"]
    draft = {
        "outside": token_of[b"x"],
        "void": -1,
        "no token": VOCAB - 1,
        "beyond": VOCAB,
        "early eos": eos,
    }[wrong]
    state = regex(compiler, "[0-9]{4}")
    bitmask = fill(state, [digit, draft, digit, digit])
    digits = tokens_of(bitmask[0])
    assert {token_of[bytes([char])] for char in range(48, 58)} <= digits
    assert all(token_bytes[token].isdigit() for token in digits)
    assert digit in tokens_of(bitmask[1])
    for row in bitmask[2:]:
        assert tokens_of(row) == set(range(VOCAB))
    with pytest.raises(ValueError, match=re.escape(str(draft))):
        state.accept(draft)
    for _ in range(4):
        assert not state.is_complete
        state.accept(digit)
    assert state.is_complete


def test_eos_as_a_draft(compiler: GrammarCompiler, token_bytes: dict[int, bytes], eos: int) -> None:
    state = regex(compiler, "a{1,3}")
    a = {piece: token for token, piece in token_bytes.items()}[b"a"]
    bitmask = fill(state, [a, eos, eos, a, eos])
    assert eos not in tokens_of(bitmask[0])
    assert {a, eos} <= tokens_of(bitmask[1])
    assert tokens_of(bitmask[2]) == {eos}
    assert tokens_of(bitmask[3]) == {eos}
    assert tokens_of(bitmask[4]) == set(range(VOCAB))
    state.accept(a)
    assert not state.is_complete
    state.accept(eos)
    state.accept(eos)
    assert state.is_complete
    with pytest.raises(ValueError, match="not allowed"):
        state.accept(a)


def test_requests_do_not_share_state(compiler: GrammarCompiler) -> None:
    first, second = (regex(compiler, "[0-9]{2}") for _ in range(2))
    before = fill(second, [])
    while not first.is_complete:
        first.accept(min(allowed(first)))
    np.testing.assert_array_equal(fill(second, []), before)
    assert not second.is_complete


def test_a_view_of_a_batch_is_filled_in_place(compiler: GrammarCompiler) -> None:
    batch = np.zeros((3, 2, WORDS), dtype=np.int32)
    state = regex(compiler, "[0-9]{2}")
    state.fill_bitmask(batch[1], [-1])
    np.testing.assert_array_equal(batch[1], fill(state, [-1]))
    assert not batch[[0, 2]].any()


@pytest.mark.parametrize(
    "bitmask",
    [
        np.zeros((3, WORDS), dtype=np.int32),
        np.zeros((2, WORDS + 1), dtype=np.int32),
        np.zeros((2, WORDS), dtype=np.int64),
    ],
)
def test_bitmask_of_the_wrong_shape(
    compiler: GrammarCompiler, bitmask: npt.NDArray[np.int32]
) -> None:
    with pytest.raises(ValueError, match=re.escape(f"int32(2, {WORDS})")):
        regex(compiler, "a").fill_bitmask(bitmask, [0])


def test_whitespace_in_json_is_free_but_bounded(
    compiler: GrammarCompiler, token_bytes: dict[int, bytes]
) -> None:
    token_of = {piece: token for token, piece in token_bytes.items()}
    state = compiler.compile(Grammar("json_schema", json.dumps(SCHEMA))).start()
    state.accept(token_of[b"{"])
    count = 0
    while token_of[b" "] in allowed(state):
        state.accept(token_of[b" "])
        count += 1
    assert count == 16
    assert token_of[b'"'] in allowed(state)


def test_dead_end_lets_the_text_end(
    compiler: GrammarCompiler,
    token_bytes: dict[int, bytes],
    eos: int,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """No token writes byte 4, so after "a" nothing can follow."""
    a = {piece: token for token, piece in token_bytes.items()}[b"a"]
    state = regex(compiler, "a\\x04|b")
    bitmask = fill(state, [a, eos])
    assert a in tokens_of(bitmask[0])
    assert tokens_of(bitmask[1]) == {eos}
    np.testing.assert_array_equal(fill(state, [a, eos]), bitmask)
    assert not state.is_stuck
    assert not caplog.records
    state.accept(a)
    assert state.is_stuck
    assert state.is_complete
    state.accept(eos)
    assert "no token can continue it" in caplog.text


def test_the_same_grammar_compiles_once(compiler: GrammarCompiler) -> None:
    assert compiler.compile(Grammar("regex", "a")) is compiler.compile(Grammar("regex", "a"))
    assert compiler.compile(Grammar("regex", "a")) is not compiler.compile(Grammar("regex", "b"))


def test_the_cache_is_bounded(tokenizer: PreTrainedTokenizerFast, eos: int) -> None:
    compiler = GrammarCompiler(tokenizer, VOCAB, [eos])
    first = compiler.compile(Grammar("regex", "a"))
    for count in itertools.count(1):
        compiler.compile(Grammar("regex", f"b{{{count}}}"))
        if count == 63:
            assert compiler.compile(Grammar("regex", "a")) is first
        if count == 64:
            break
    assert compiler.compile(Grammar("regex", "a")) is not first


def test_token_that_the_engine_offers_but_does_not_take(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """A unigram model spells bytes it does not know as its unknown token."""
    pieces = ["<unk>", EOS, *string.ascii_lowercase, ",", "Ġ"]
    model = models.Unigram([(piece, -1.0) for piece in pieces], unk_id=0, byte_fallback=False)
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<unk>", EOS])
    compiler = GrammarCompiler(fast(tokenizer), VOCAB, [1])
    state = regex(compiler, "(a|b)\x04c")
    state.accept(pieces.index("a"))
    state.accept(0)
    assert allowed(state) == {1}
    assert "gave up" in caplog.text
