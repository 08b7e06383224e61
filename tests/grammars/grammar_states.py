"""What a grammar allows next, as token ids and as text."""

from __future__ import annotations

import json

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import bytes_to_unicode

from unispec.sampling.grammar import Grammar, GrammarCompiler, GrammarState

__all__ = [
    "EOS",
    "REGEXES",
    "VOCAB",
    "WORDS",
    "allowed",
    "allows",
    "fast",
    "fill",
    "regex",
    "tokens_of",
    "train_tokenizer",
]

EOS = "<|end|>"
SENTENCES = [
    "The quick brown fox jumps over the lazy dog, again and again.",
    'He said: "no, 12 is not 21" and {"name": "Ann", "age": 34, "tags": ["a", "b"]} was printed.',
    "Maybe so, maybe not; yes or no? Été à Zürich, 東京 and Ελλάδα.",
] * 4
TOKENS = 480
VOCAB = 517  # wider than the tokenizer, and no multiple of 32
WORDS = 17

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


def allows(compiler: GrammarCompiler, schema: object, text: str) -> bool:
    """Whether the text as a whole satisfies the schema."""
    state = compiler.compile(Grammar("json_schema", json.dumps(schema))).start()
    try:
        for byte in [*text.encode(), 256]:
            state.accept(byte)
    except ValueError:
        return False
    return True
