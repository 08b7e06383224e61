"""Tokenizers of the tests of grammars, and what compiles grammars for them."""

from __future__ import annotations

import pytest
from grammar_states import EOS, VOCAB, fast, train_tokenizer
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import bytes_to_unicode

from unispec.sampling.grammar import GrammarCompiler


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    return fast(train_tokenizer())


@pytest.fixture(scope="session")
def eos(tokenizer: PreTrainedTokenizerFast) -> int:
    return tokenizer.convert_tokens_to_ids(EOS)


@pytest.fixture(scope="session")
def token_bytes(tokenizer: PreTrainedTokenizerFast) -> dict[int, bytes]:
    """The bytes of every token but EOS, from the byte-level alphabet."""
    byte_of = {char: byte for byte, char in bytes_to_unicode().items()}
    vocabulary = tokenizer.get_vocab()
    return {
        token: bytes(byte_of[char] for char in piece)
        for piece, token in vocabulary.items()
        if piece != EOS
    }


@pytest.fixture(scope="session")
def compiler(tokenizer: PreTrainedTokenizerFast, eos: int) -> GrammarCompiler:
    return GrammarCompiler(tokenizer, VOCAB, [eos])


@pytest.fixture(scope="session")
def tokenizer_of_bytes() -> PreTrainedTokenizerFast:
    bytes_of = {char: byte for byte, char in bytes_to_unicode().items()}
    tokenizer = Tokenizer(models.BPE(bytes_of, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([EOS])
    return fast(tokenizer)


@pytest.fixture(scope="session")
def spelling(tokenizer_of_bytes: PreTrainedTokenizerFast) -> GrammarCompiler:
    """Its tokens are the bytes: a text is allowed or not, byte by byte."""
    return GrammarCompiler(tokenizer_of_bytes, 257, [256])
