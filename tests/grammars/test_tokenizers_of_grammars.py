"""Which tokenizers a grammar can be compiled for, and which tokens end a text."""

from __future__ import annotations

import json
import re
import string

import numpy as np
import pytest
from grammar_states import (
    EOS,
    REGEXES,
    VOCAB,
    allowed,
    fast,
    fill,
    regex,
    tokens_of,
    train_tokenizer,
)
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from unispec.errors import InputError
from unispec.sampling.grammar import Grammar, GrammarCompiler


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
