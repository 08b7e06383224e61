"""Grammar masks: what they allow, how drafts walk through them, and what is refused."""

from __future__ import annotations

import contextlib
import itertools
import json
import random
import re
import string
from typing import Any

import jsonschema
import numpy as np
import numpy.typing as npt
import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import bytes_to_unicode

from unispec.errors import InputError
from unispec.sampling.grammar import Grammar, GrammarCompiler, GrammarState

EOS = "<|end|>"
SENTENCES = [
    "The quick brown fox jumps over the lazy dog, again and again.",
    'He said: "no, 12 is not 21" and {"name": "Ann", "age": 34, "tags": ["a", "b"]} was printed.',
    "Maybe so, maybe not; yes or no? Été à Zürich, 東京 and Ελλάδα.",
] * 4
TOKENS = 480
VOCAB = 517  # wider than the tokenizer, and no multiple of 32
WORDS = 17

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
REGEXES = [
    r"[0-9]{3}-[a-z]{2,5}( [A-Z]\w?){0,3}",
    r"(yes|no|maybe( so| not){0,2})\.?",
    r"(é|日本|[ж-я]){1,8}",
    r'^".{0,12}"$',
    r"(?i:the) (quick|brown|lazy) (fox|dog)",
    r"(a|b\n){0,6}",
]


def train_tokenizer() -> Tokenizer:
    """A byte-level BPE that knows every byte but 0x04."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = [char for byte, char in bytes_to_unicode().items() if byte != 4]
    trainer = trainers.BpeTrainer(
        vocab_size=TOKENS, special_tokens=[EOS], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(SENTENCES, trainer)
    return tokenizer


def fast(tokenizer: Tokenizer) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=EOS)


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return fast(train_tokenizer())


@pytest.fixture(scope="module")
def eos(tokenizer: PreTrainedTokenizerFast) -> int:
    return tokenizer.convert_tokens_to_ids(EOS)


@pytest.fixture(scope="module")
def token_bytes(tokenizer: PreTrainedTokenizerFast) -> dict[int, bytes]:
    """The bytes of every token but EOS, from the byte-level alphabet."""
    byte_of = {char: byte for byte, char in bytes_to_unicode().items()}
    vocabulary = tokenizer.get_vocab()
    return {
        token: bytes(byte_of[char] for char in piece)
        for piece, token in vocabulary.items()
        if piece != EOS
    }


@pytest.fixture(scope="module")
def compiler(tokenizer: PreTrainedTokenizerFast, eos: int) -> GrammarCompiler:
    return GrammarCompiler(tokenizer, VOCAB, [eos])


def regex(compiler: GrammarCompiler, text: str) -> GrammarState:
    return compiler.compile(Grammar("regex", text)).start()


def fill(state: GrammarState, drafts: list[int]) -> npt.NDArray[np.int32]:
    bitmask = np.full((len(drafts) + 1, WORDS), 0x5A5A5A5A, dtype=np.int32)
    state.fill_bitmask(bitmask, drafts)
    return bitmask  # [K+1, ceil(V/32)]


def tokens_of(row: npt.NDArray[np.int32]) -> set[int]:
    """The set bits of a mask, by the documented layout."""
    return {
        32 * word + bit
        for word, value in enumerate(row.tolist())
        for bit in range(32)
        if value >> bit & 1
    }


def allowed(state: GrammarState) -> set[int]:
    return tokens_of(fill(state, [])[0])


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


def test_several_eos_that_are_ordinary_text(
    tokenizer: PreTrainedTokenizerFast, eos: int, token_bytes: dict[int, bytes]
) -> None:
    token_of = {piece: token for token, piece in token_bytes.items()}
    a, b = token_of[b"a"], token_of[b"b"]
    state = regex(GrammarCompiler(tokenizer, VOCAB, [eos, a]), "[ab]{2}")
    assert b in allowed(state)
    assert not {a, eos} & allowed(state)
    state.accept(b)
    state.accept(b)
    assert allowed(state) == {a, eos}
    assert state.is_complete
    state.accept(a)
    assert allowed(state) == {a, eos}


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


def test_no_unknown_token_stands_for_missing_bytes(eos: int) -> None:
    plain = train_tokenizer()
    definition = json.loads(plain.to_str())
    definition["model"] |= {"unk_token": EOS, "fuse_unk": True}
    compiler = GrammarCompiler(fast(Tokenizer.from_str(json.dumps(definition))), VOCAB, [1])
    assert tokens_of(fill(regex(compiler, "(a|b)\\x04"), [])[0]).isdisjoint({eos, 1})
    with pytest.raises(InputError, match="no text that this tokenizer can write"):
        regex(compiler, "\\x04")


def test_tokenizer_converted_from_gguf(compiler: GrammarCompiler, eos: int) -> None:
    """Its decoder has a byte fallback before the byte-level one."""
    converted = train_tokenizer()
    converted.decoder = decoders.Sequence(
        [
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Replace("▁", " "),
            decoders.ByteLevel(),
        ]
    )
    other = GrammarCompiler(fast(converted), VOCAB, [eos])
    for pattern in REGEXES:
        np.testing.assert_array_equal(
            fill(regex(other, pattern), []), fill(regex(compiler, pattern), [])
        )


def test_padding_and_truncation_are_left_alone(compiler: GrammarCompiler, eos: int) -> None:
    padded = fast(train_tokenizer())
    padded.backend_tokenizer.enable_padding(length=32)
    padded.backend_tokenizer.enable_truncation(2)
    other = GrammarCompiler(padded, VOCAB, [eos])
    pattern = "the (fox|dog)"
    np.testing.assert_array_equal(
        fill(regex(other, pattern), []), fill(regex(compiler, pattern), [])
    )
    assert padded.backend_tokenizer.padding is not None
    assert padded.backend_tokenizer.truncation is not None


def test_byte_fallback_tokenizer() -> None:
    """As Llama 2 has: pieces with a visible space, and one token per byte beside them."""
    pieces = ["</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", *string.ascii_letters, ","]
    merges = [("▁", "t"), ("b", "e")]
    vocabulary = {piece: token for token, piece in enumerate([*pieces, "▁t", "be"])}
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    tokenizer.add_special_tokens(["</s>"])
    compiler = GrammarCompiler(
        PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>"), 400, [0]
    )
    state = compiler.compile(Grammar("regex", "( t|be|é)[xy]")).start()
    bitmask = np.zeros((3, 13), dtype=np.int32)
    state.fill_bitmask(bitmask, [vocabulary["▁t"], vocabulary["x"]])
    # Space, "b" and the first byte of "é" also have their byte token.
    first = ["▁", "▁t", "b", "be", "<0x20>", "<0x62>", "<0xC3>"]
    assert tokens_of(bitmask[0]) == {vocabulary[piece] for piece in first}
    assert tokens_of(bitmask[1]) == {vocabulary[piece] for piece in ["x", "y", "<0x78>", "<0x79>"]}
    assert tokens_of(bitmask[2]) == {0}


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


@pytest.mark.parametrize(
    ("pattern", "cause"),
    [
        ("a(", "unclosed group"),
        ("[b-a]", "range"),
        ("(?=a)b", "look-around"),
        (r"(a)\1", "backreferences"),
        (r"a\bb", "lookarounds"),
        (r"[^\s\S]", "matches no text"),
        ("\ud800", "surrogates"),
    ],
)
def test_regex_that_cannot_be_used(compiler: GrammarCompiler, pattern: str, cause: str) -> None:
    with pytest.raises(InputError) as caught:
        compiler.compile(Grammar("regex", pattern))
    message = str(caught.value)
    assert message.startswith(f"The regex {pattern!r} cannot be used: ")
    assert cause in message
    assert "Rust syntax" in message
    assert "\n" not in message


@pytest.mark.parametrize(
    ("text", "cause"),
    [
        ("", "Expecting value"),
        ('{"type": ', "Expecting value"),
        ('{"minimum": NaN}', "NaN is no number of JSON"),
        ("[1, 2]", "not a JSON object"),
        ("true", "not a JSON object"),
        ("[" * 100_000, "nested more than 64 deep"),
        ('{"items":' * 3000 + "{}" + "}" * 3000, "nested more than 64 deep"),
        ('{"items":' * 65 + "{}" + "}" * 65, "nested more than 64 deep"),
        ('{"type": "text"}', "Invalid type: text"),
        ('{"enum": []}', "Unsatisfiable"),
        ('{"minimum": 3, "maximum": 1, "type": "integer"}', "minimum (3)"),
        ('{"$ref": "#/definitions/x"}', "/definitions/x"),
        ('{"uniqueItems": true, "type": "array"}', "uniqueItems"),
        ('{"type": "string", "pattern": "(?=a)"}', "look-around"),
        ('{"x-guidance": {"lenient": true}, "not": {}}', "not"),
    ],
)
def test_schema_that_cannot_be_used(compiler: GrammarCompiler, text: str, cause: str) -> None:
    with pytest.raises(InputError) as caught:
        compiler.compile(Grammar("json_schema", text))
    message = str(caught.value)
    assert message.startswith("The JSON schema ")
    assert cause in message
    assert "\n" not in message
    assert len(message) < 400


def chain(count: int, link: str) -> str:
    """A schema whose definitions refer to one another, in a row."""
    definitions = {f"d{i}": json.loads(link % f"#/$defs/d{i + 1}") for i in range(count)}
    definitions[f"d{count}"] = {"type": "null"}
    return json.dumps({"$ref": "#/$defs/d0", "$defs": definitions})


LINKS = [
    '{"$ref": "%s"}',
    '{"type": "object", "properties": {"a": {"$ref": "%s"}}}',
    '{"type": "object", "additionalProperties": {"anyOf": [{"$ref": "%s"}]}}',
]


@pytest.mark.parametrize("link", LINKS)
def test_references_that_lead_to_one_another(compiler: GrammarCompiler, link: str) -> None:
    """5,000 of them ended the process."""
    with pytest.raises(InputError, match=r"more than 1000 of its references lead to one another"):
        compiler.compile(Grammar("json_schema", chain(5000, link)))
    start = compiler.compile(Grammar("json_schema", chain(990, link))).start()
    assert not start.is_stuck


def test_references_that_the_engine_follows_in_another_order(compiler: GrammarCompiler) -> None:
    """It meets the first of them first, we the last: there is room for all that it reads."""
    schema = json.loads(chain(5000, LINKS[1]))
    last_first = [{"$ref": f"#/$defs/d{i}"} for i in range(5000, -1, -1)]
    schema |= {
        "type": "object",
        "additionalProperties": {"anyOf": last_first},
        "properties": {"a": {"$ref": schema.pop("$ref")}},
        "required": ["a"],
    }
    with contextlib.suppress(InputError):
        compiler.compile(Grammar("json_schema", json.dumps(schema)))


SCHEMA_NUMBERS = [
    ('{"const": 9007199254740993}', "const 9007199254740993 is beyond 2^53"),
    ('{"enum": ["a", [{"b": -9007199254740993}]]}', "enum -9007199254740993 is beyond 2^53"),
    ('{"type": "integer", "minimum": 9007199254740993}', "minimum 9007199254740993"),
    ('{"type": "integer", "maximum": 18446744073709551615}', "maximum 18446744073709551615"),
    ('{"exclusiveMinimum": 9007199254740992}', "exclusiveMinimum 9007199254740992 is beyond"),
    ('{"exclusiveMaximum": 1e300}', "exclusiveMaximum 1e+300 is beyond 2^53"),
    ('{"const": 0.12345678901234567891}', "const 0.12345678901234567891 cannot be enforced"),
    ('{"maximum": 1e400}', "maximum 1e400 cannot be enforced"),
    ('{"maximum": ' + "9" * 5000 + "}", "cannot be enforced to the last digit"),
    ('{"properties": {"a": {"items": {"$ref": "#/x/0"}}}, "x": [{"const": 1e17}]}', "const 1e+17"),
    ('{"$ref": "#y", "$defs": {"x": {"$anchor": "y", "const": 1e17}}}', "const 1e+17"),
    ('{"const": "a\\u0001"}', "const has the control character U+0001"),
]


@pytest.mark.parametrize(("text", "cause"), SCHEMA_NUMBERS)
def test_values_that_the_engine_would_change_are_refused(
    compiler: GrammarCompiler, text: str, cause: str
) -> None:
    with pytest.raises(InputError) as caught:
        compiler.compile(Grammar("json_schema", text))
    assert cause in str(caught.value)
    assert len(str(caught.value)) < 400


@pytest.fixture(scope="module")
def tokenizer_of_bytes() -> PreTrainedTokenizerFast:
    bytes_of = {char: byte for byte, char in bytes_to_unicode().items()}
    tokenizer = Tokenizer(models.BPE(bytes_of, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([EOS])
    return fast(tokenizer)


@pytest.fixture(scope="module")
def spelling(tokenizer_of_bytes: PreTrainedTokenizerFast) -> GrammarCompiler:
    """Its tokens are the bytes: a text is allowed or not, byte by byte."""
    return GrammarCompiler(tokenizer_of_bytes, 257, [256])


def allows(compiler: GrammarCompiler, schema: object, text: str) -> bool:
    """Whether the text as a whole satisfies the schema."""
    state = compiler.compile(Grammar("json_schema", json.dumps(schema))).start()
    try:
        for byte in [*text.encode(), 256]:
            state.accept(byte)
    except ValueError:
        return False
    return True


def test_numbers_up_to_2_53_are_enforced(spelling: GrammarCompiler) -> None:
    edge = 2**53
    for number in (edge - 1, edge, edge + 1):
        assert allows(spelling, {"const": edge}, str(number)) == (number == edge)
        assert allows(spelling, {"type": "integer", "minimum": edge}, str(number)) == (
            number >= edge
        )
        assert allows(spelling, {"type": "integer", "maximum": edge - 1}, str(number)) == (
            number < edge
        )
    assert allows(spelling, {"default": 2**70, "type": "null"}, "null")


PATTERNS = [
    r'^[^"]*$',
    r"^[^\\]*$",
    r'^[^"\\]*$',
    r'^[^]"]*$',
    r'^[^\n"]*$',
    r'^[^\s"]+$',
    r'^(?:[^"]|\\)*$',
    r'^\[[^"]{0,3}\]$',
    r'[^"]',
    r"^[^a-z]+$",
    r'^[a-z"]*$',
    r"^.*$",
    r"^\W*$",
]
STRINGS = ["", "a", '"', "\\", 'a"', "a\\", "\n", "é🙂", "[b]", "a b", "]", '\\"', '["]', "["]


@pytest.mark.parametrize("pattern", PATTERNS)
def test_patterns_of_strings_and_keys(spelling: GrammarCompiler, pattern: str) -> None:
    """Quotes and backslashes passed classes that leave them out."""
    keyed = {"patternProperties": {pattern: {}}, "additionalProperties": False}
    for text in STRINGS:
        # Python's $ also matches before an end of line.
        right = re.search(re.sub(r"\$$", r"\\Z", pattern), text, re.ASCII) is not None
        written = json.dumps(text, ensure_ascii=False)
        assert allows(spelling, {"type": "string", "pattern": pattern}, written) == right, text
        assert allows(spelling, keyed | {"type": "object"}, f"{{{written}:1}}") == right, text


def test_a_pattern_behind_an_anchor(spelling: GrammarCompiler) -> None:
    schema = {"$ref": "#x", "$defs": {"y": {"$anchor": "x", "type": "string", "pattern": '^[^"]$'}}}
    assert allows(spelling, schema, '"a"')
    assert not allows(spelling, schema, r'"\""')


def test_a_pattern_of_many_lines_is_refused(spelling: GrammarCompiler) -> None:
    with pytest.raises(InputError, match="flag x"):
        allows(spelling, {"pattern": "(?x) [^'] # no ["}, "1")


PERSON = {"name": {"type": "string"}, "age": {"type": "integer"}, "pet": {"type": "null"}}
WHOLE = ['"name": "x"', '"age": 3', '"pet": null', '"names": [1]']


@pytest.mark.parametrize("free", [{}, {"additionalProperties": True}, {"additionalProperties": {}}])
def test_optional_properties_come_in_any_order(
    spelling: GrammarCompiler, free: dict[str, object]
) -> None:
    schema = {"type": "object", "properties": PERSON, **free}
    for size in range(len(WHOLE) + 1):
        for members in itertools.permutations(WHOLE, size):
            assert allows(spelling, schema, "{" + ", ".join(members) + "}"), members
    for wrong in ('"name": 3', '"age": "x"', '"pet": 0', r'"n\u0061me": 3'):
        for before in ([], WHOLE[1:2], WHOLE[3:]):
            assert not allows(spelling, schema, "{" + ", ".join([*before, wrong]) + "}"), wrong


def test_required_properties_come_first_and_in_the_order_of_the_schema(
    spelling: GrammarCompiler,
) -> None:
    """Optional ones before them come at their place, or later."""
    schema = {"type": "object", "properties": PERSON, "required": ["age"]}
    for members in itertools.permutations(WHOLE):
        early = members[: members.index(WHOLE[1])]
        text = "{" + ", ".join(members) + "}"
        assert allows(spelling, schema, text) == (early in [(), (WHOLE[0],)]), text
    two = {**schema, "required": ["age", "name"]}
    assert allows(spelling, two, '{"name": "", "age": 1, "x": 0, "pet": null}')
    assert not allows(spelling, two, '{"age": 1, "name": ""}')
    assert not allows(spelling, two, '{"name": ""}')


def test_without_other_keys_the_order_is_that_of_the_schema(spelling: GrammarCompiler) -> None:
    schema = {"type": "object", "properties": PERSON, "additionalProperties": False}
    for size in range(4):
        for members in itertools.permutations(WHOLE[:3], size):
            right = [*members] == [member for member in WHOLE if member in members]
            assert allows(spelling, schema, "{" + ", ".join(members) + "}") == right, members


def test_order_in_schemas_that_are_put_together(spelling: GrammarCompiler) -> None:
    tree = {
        "type": "object",
        "properties": {"next": {"$ref": "#"}, "kind": {"enum": ["a"]}, "size": {"type": "integer"}},
        "required": ["kind"],
        "$defs": {"unused": {}},
    }
    assert allows(spelling, tree, '{"next": {"kind": "a", "size": 1}, "kind": "a"}')
    assert allows(
        spelling, tree, '{"kind": "a", "size": 1, "next": {"kind": "a", "next": {"kind": "a"}}}'
    )
    assert not allows(spelling, tree, '{"kind": "a", "next": {"size": 1}}')
    either = {"properties": PERSON, "anyOf": [{"required": ["name"]}, {"required": ["age"]}]}
    assert allows(spelling, either, '{"name": "", "age": 1, "x": 0}')
    assert not allows(spelling, either, '{"age": 1, "name": ""}')
    assert not allows(spelling, either, '{"pet": null}')
    both = {
        "allOf": [{"type": "object", "properties": PERSON}, {"properties": {"x": {"const": 1}}}]
    }
    assert allows(spelling, both, '{"name": "", "age": 1, "x": 1}')
    assert not allows(spelling, both, '{"x": 1, "age": 1}')
    assert not allows(spelling, both, '{"age": 1, "x": 2}')
    # Alternatives of which each stands alone, and a reference alone, are not put together.
    maybe = {
        "anyOf": [{"type": "null"}, {"$ref": "#/$defs/p"}],
        "$defs": {"p": {"type": "object", "properties": PERSON}},
    }
    assert allows(spelling, maybe, '{"age": 1, "name": ""}')
    counted = {"type": "object", "properties": PERSON, "required": [*PERSON], "maxProperties": 3}
    assert allows(spelling, counted, '{"name": "", "age": 1, "pet": null}')
    # A path through `properties` keeps the order of the schema.
    path = {"properties": {"a": {"type": "null"}, "b": {"$ref": "#/properties/a"}}}
    assert allows(spelling, path, '{"a": null, "b": null}')
    assert not allows(spelling, path, '{"a": null, "b": 1}')


BASE: dict[str, object] = {
    "properties": {"id": {"const": 1}, "note": {"type": "string"}},
    "required": ["id"],
}
PUT_TOGETHER: list[tuple[dict[str, object], str]] = [
    (
        {
            "allOf": [
                {"$ref": "#/$defs/B"},
                {"properties": {"k": {"const": 2}}, "required": ["k"]},
            ],
            "$defs": {"B": BASE},
        },
        '{"id": 1, "note": "s", "k": 2}',
    ),
    (
        {
            "properties": {"a": {"type": "integer"}},
            "anyOf": [
                {"properties": {"a": {"const": 1}}, "required": ["a"]},
                {"properties": {"b": {"type": "string"}}, "required": ["b"]},
            ],
        },
        '{"a": 2, "b": "x"}',
    ),
    ({"properties": {"a": {}}, "required": ["c"]}, '{"a": 1, "c": 1}'),
    (
        {
            "allOf": [
                {"properties": {"in": BASE}},
                {"properties": {"in": {"properties": {"k": {}}, "required": ["k"]}}},
            ]
        },
        '{"in": {"id": 1, "note": "s", "k": 2}}',
    ),
    (
        {
            "properties": {"in": BASE},
            "required": ["in"],
            "patternProperties": {"^in": {"properties": {"k": {}}, "required": ["k"]}},
        },
        '{"in": {"id": 1, "note": "s", "k": 2}}',
    ),
]


@pytest.mark.parametrize(("schema", "text"), PUT_TOGETHER)
def test_the_order_of_the_schema_is_always_right(
    spelling: GrammarCompiler, schema: dict[str, object], text: str
) -> None:
    jsonschema.validate(json.loads(text), schema)
    assert allows(spelling, schema, text)


def test_a_required_property_that_is_not_declared_comes_behind_those_that_are(
    spelling: GrammarCompiler,
) -> None:
    schema = {"properties": {"a": {"const": 1}, "b": {"const": 2}}, "required": ["c"]}
    members = ['"a": 1', '"b": 2', '"c": 3']
    for size in range(4):
        for some in itertools.permutations(members, size):
            right = '"c": 3' in some and some[:2] != (members[1], members[0])
            assert allows(spelling, schema, "{" + ", ".join(some) + "}") == right, some
    assert not allows(spelling, schema, '{"c": 3, "a": 2}')


def test_many_optional_properties_before_a_required_one(spelling: GrammarCompiler) -> None:
    """The fewer, the more of their orders; the key never has to become another one."""
    for count in (5, 15, 60):
        names = [f"p{i}" for i in range(count)]
        schema = {
            "properties": {key: {"const": 1} for key in [*names, "z"]},
            "required": ["z"],
        }

        def written(order: list[str], schema: object = schema) -> bool:
            return allows(spelling, schema, json.dumps(dict.fromkeys(order, 1)))

        assert written([*names, "z"])
        assert written(["z", *names[::-1]])
        assert written(["p1", "p3", "z"])
        assert written(["p1", "z", "p3"]) == (count < 60)
        assert written(["p1", "p3", "z", "p2"]) == (count == 5)
        assert not written([*names])
        assert not written(["p3", "p1", "z"])
        assert not allows(spelling, schema, '{"z": 1, "p3": 2}')


def test_optional_properties_beside_patterns_come_in_any_order(spelling: GrammarCompiler) -> None:
    schema: dict[str, object] = {
        "properties": {"a": {"type": "integer"}, "b": {"type": "null"}},
        "patternProperties": {"^x": {"type": "string"}},
    }
    for members in itertools.permutations(['"a": 1', '"b": null', '"x1": "s"', '"ab": []']):
        assert allows(spelling, schema, "{" + ", ".join(members) + "}"), members
    assert not allows(spelling, schema, '{"x1": "s", "a": "s"}')
    # A pattern that names a declared property leaves it at its place.
    schema["patternProperties"] = {"^[ax]": {"minimum": 3}}
    assert allows(spelling, schema, '{"a": 3, "b": null, "x1": "s"}')
    assert not allows(spelling, schema, '{"x1": "s", "a": 2}')
    assert not allows(spelling, schema, '{"a": 2}')


def test_alternatives_of_many_objects_do_not_exhaust_the_engine(spelling: GrammarCompiler) -> None:
    """It gives up in the middle of a text where too much is open at once."""
    common = {key: {"const": 1} for key in "abcdefgh"}
    each = [{"properties": common | {f"k{i}": {"const": i}}, "required": ["h"]} for i in range(60)]
    assert allows(spelling, {"anyOf": each}, '{"a": 1, "c": 1, "h": 1, "k7": 7}')


def random_part(choose: random.Random, depth: int) -> dict[str, object]:
    """What a schema says of an object: properties, required ones, other keys."""
    leaves: list[dict[str, object]] = [{}, {"type": "integer"}, {"type": "string"}, {"const": 1}]
    part: dict[str, object] = {}
    if choose.random() < 0.85:
        names = choose.sample(["a", "b", "c", "x1"], choose.randint(1, 3))
        part["properties"] = {
            name: random_combination(choose, depth + 1)
            if depth < 1 and choose.random() < 0.3
            else choose.choice(leaves)
            for name in names
        }
    if choose.random() < 0.5:
        part["required"] = choose.sample(["a", "b", "c", "d"], choose.randint(1, 2))
    if choose.random() < 0.2:
        part["patternProperties"] = {choose.choice(["^x", "1$", "^a"]): choose.choice(leaves)}
    if choose.random() < 0.2:
        part["additionalProperties"] = choose.choice([False, *leaves])
    return part


def random_combination(choose: random.Random, depth: int = 0) -> dict[str, object]:
    """A schema of parts that are put together, or are alternatives, or stand alone."""
    reference = {"$ref": f"#/$defs/{choose.choice('AB')}"}
    schema = random_part(choose, depth) if choose.random() < 0.7 else {}
    kind = choose.choice(["allOf", "anyOf", "$ref", "", ""])
    if kind == "$ref":
        schema |= reference
    elif kind:
        schema[kind] = [
            choose.choice([reference, random_part(choose, depth)])
            for _ in range(choose.randint(1, 2))
        ]
    if choose.random() < 0.5:
        schema["type"] = "object"
    return schema


def random_object(choose: random.Random, depth: int = 0) -> dict[str, object]:
    keys = choose.sample(["a", "b", "c", "d", "x1", "ab"], choose.randint(0, 4))
    return {
        key: random_object(choose, 1)
        if depth == 0 and choose.random() < 0.25
        else choose.choice([1, 1, 1, 2, "s"])
        for key in keys
    }


def test_freeing_the_order_refuses_nothing_and_allows_nothing_wrong(
    spelling: GrammarCompiler, tokenizer_of_bytes: PreTrainedTokenizerFast
) -> None:
    """Of random schemas and texts; in the schema's order is what the engine allows by itself."""
    choose = random.Random(0)
    plain = GrammarCompiler(tokenizer_of_bytes, 257, [256])
    kept = freed = 0
    for _ in range(150):
        schema = random_combination(choose)
        schema["$defs"] = {"A": random_part(choose, 1), "B": random_part(choose, 1)}
        right = jsonschema.Draft202012Validator(schema)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("unispec.sampling.grammar.rewrite_schema", lambda text: [text])
            try:
                plain.compile(Grammar("json_schema", json.dumps(schema)))
            except InputError:
                continue
        for _ in range(30):
            value = random_object(choose)
            text = json.dumps(value)
            if allows(plain, schema, text):
                kept += 1
                assert allows(spelling, schema, text), (schema, text)
            elif not right.is_valid(value):
                assert not allows(spelling, schema, text), (schema, text)
            else:
                freed += allows(spelling, schema, text)
    assert kept > 300
    assert freed > 50


def random_schema(choose: random.Random, depth: int = 0) -> dict[str, object]:
    """An object of few properties, some of them objects, lists or strings with a pattern."""
    leaves: list[dict[str, object]] = [
        {"type": "integer", "minimum": -3, "maximum": 12},
        {"type": "string", "pattern": '^[^"]{0,3}$'},
        {"type": "string", "pattern": r"^[^\\]?$", "maxLength": 3},
        {"enum": ["a", "é\n", 1, None]},
        {"type": "array", "items": {"type": "boolean"}, "maxItems": 2},
    ]
    if depth == 2:
        return choose.choice(leaves)
    names = choose.sample(["a", "ab", "x y", 'q"', "name", "é"], choose.randint(1, 4))
    schema: dict[str, object] = {
        "type": "object",
        "properties": {
            name: random_schema(choose, choose.choice([depth + 1, 2])) for name in names
        },
        "required": choose.sample(names, choose.randint(0, len(names))),
    }
    other = [None, None, True, False, {"type": "integer"}]
    if (additional := choose.choice(other)) is not None:
        schema["additionalProperties"] = additional
    return schema


@pytest.mark.parametrize("seed", range(60))
def test_what_is_written_satisfies_a_random_schema(spelling: GrammarCompiler, seed: int) -> None:
    choose = random.Random(seed)
    schema = random_schema(choose)
    state = spelling.compile(Grammar("json_schema", json.dumps(schema))).start()
    text = b""
    while not state.is_complete and len(text) < 400:
        bitmask = np.zeros((1, 9), dtype=np.int32)
        state.fill_bitmask(bitmask, [])
        tokens = sorted(tokens_of(bitmask[0]) - set(b" \t\n\r")) or [32]
        ending = [token for token in tokens if token in {*b'}],":', 256}]
        token = choose.choice(ending if ending and choose.random() < 0.4 else tokens)
        state.accept(token)
        if token == 256:
            break
        text += bytes([token])
    if state.is_complete:
        jsonschema.validate(json.loads(text), schema)


@pytest.mark.parametrize("ids", [[], [VOCAB], [-1]])
def test_eos_ids_outside_the_vocabulary(tokenizer: PreTrainedTokenizerFast, ids: list[int]) -> None:
    with pytest.raises(InputError, match=re.escape(f"{ids} do not suit a vocabulary of {VOCAB}")):
        GrammarCompiler(tokenizer, VOCAB, ids)


def test_a_tokenizer_with_more_tokens_than_the_model(
    tokenizer: PreTrainedTokenizerFast, token_bytes: dict[int, bytes], eos: int
) -> None:
    """The model has no logits for the rest: words are spelled with the tokens that it has."""
    vocab = 300
    assert vocab < len(tokenizer)
    text = "the quick brown fox"
    assert max(tokenizer.encode(text)) >= vocab
    compiler = GrammarCompiler(tokenizer, vocab, [eos])
    state = compiler.compile(Grammar("regex", "(the|a) quick (brown|red) fox[.!]?")).start()
    written = b""
    bitmask = np.zeros((1, 10), dtype=np.int32)
    while not state.is_complete:
        state.fill_bitmask(bitmask, [])
        tokens = tokens_of(bitmask[0])
        assert tokens and max(tokens) < vocab
        for token in range(vocab, len(tokenizer)):
            with pytest.raises(ValueError, match=f"token {token} is not allowed"):
                state.accept(token)
        fitting = [
            token
            for token in tokens - {eos}
            if text.encode().startswith(written + token_bytes[token])
        ]
        if not fitting:
            assert eos in tokens
            break
        state.accept(fitting[0])
        written += token_bytes[fitting[0]]
    assert written.decode() == text


@pytest.mark.parametrize("kind", ["BPE", "Unigram"])
def test_tokens_beyond_the_model_of_other_kinds(kind: str) -> None:
    """Added ones, joined ones, and those of a vocabulary that is a list."""
    pieces = ["<unk>", EOS, *string.ascii_lowercase, ",", "Ġ", "ab", "bc"]
    if kind == "BPE":
        vocabulary = {piece: token for token, piece in enumerate(pieces)}
        tokenizer = Tokenizer(models.BPE(vocabulary, [("a", "b"), ("b", "c")]))
    else:
        tokenizer = Tokenizer(models.Unigram([(piece, -1.0) for piece in pieces], unk_id=0))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<unk>", EOS, "<late>"])
    for vocab in (30, 31, 32, 40):
        compiler = GrammarCompiler(fast(tokenizer), vocab, [1])
        state = compiler.compile(Grammar("regex", "(a|b)bc")).start()
        bitmask = np.zeros((1, -(-vocab // 32)), dtype=np.int32)
        state.fill_bitmask(bitmask, [])
        first = {token for token in map(pieces.index, ("a", "b", "ab")) if token < vocab}
        assert tokens_of(bitmask[0]) == first


def test_tokenizer_without_bytes() -> None:
    """A word-level tokenizer: its tokens do not say where the spaces are."""
    words = {"<unk>": 0, EOS: 1, "to": 2, "be": 3}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    with pytest.raises(InputError, match="cannot be told"):
        GrammarCompiler(fast(tokenizer), 32, [1])


def test_slow_tokenizer() -> None:
    with pytest.raises(InputError, match="str is not a fast tokenizer"):
        GrammarCompiler("tokenizer.model", VOCAB, [0])  # type: ignore[arg-type]


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


@pytest.mark.parametrize(
    ("kind", "text", "message"),
    [
        ("xml", "<a/>", "kind is 'xml'; choose json_schema or regex"),
        (None, "a", "kind is None; choose json_schema or regex"),
        ("json_schema", {"type": "object"}, r"text is a dict; give a string, .*json.dumps"),
        ("regex", None, "text is a NoneType; give a string"),
    ],
)
def test_a_grammar_of_another_kind_or_type(kind: Any, text: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        Grammar(kind, text)


def test_a_keyword_that_asks_for_nothing(compiler: GrammarCompiler) -> None:
    schema = {"type": "array", "items": {"format": "password"}, "uniqueItems": False}
    assert compiler.compile(Grammar("json_schema", json.dumps(schema)))


@pytest.mark.parametrize(
    ("schema", "message"),
    [
        ({"allOf": [{"type": "object"}] * 65}, "its allOf has 65 parts, and at most 64"),
        (
            {"oneOf": [{"type": "integer"}, {"type": "number"}]},
            "a oneOf whose parts may match the same text; anyOf can be enforced",
        ),
        ({"type": "array", "uniqueItems": True}, "uniqueItems"),
    ],
)
def test_a_schema_that_is_refused_names_the_keyword(
    compiler: GrammarCompiler, schema: dict[str, Any], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        compiler.compile(Grammar("json_schema", json.dumps(schema)))
