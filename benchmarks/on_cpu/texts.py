"""What is asked: chat prompts, passages of a book, or random tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
from generation.prompts import encode, load_prompts
from transformers import PreTrainedTokenizerBase

__all__ = ["BOOK", "ModelTexts", "RandomTexts", "Texts"]

_BENCHMARKS = Path(__file__).resolve().parent.parent
BOOK = _BENCHMARKS / "data" / "alice.txt"
"""The beginning of Alice's Adventures in Wonderland (1865), in the public domain."""
_QUESTION = "Tell the passage above again, in your own words."
_CHAT_CONTEXT = 128
"""Prompts of up to this length are chat prompts as they are, 36 to 127 tokens."""
_STRIDE = 211
"""Between the beginnings of two passages: no two begin alike, so that no cache helps."""


class Texts(Protocol):
    """Prompts in tokens."""

    def batch(self, context: int, rows: int, turn: int) -> list[list[int]]:
        """The prompts of one batch; those of the next turn are others."""

    def prefill(self, length: int, turn: int) -> list[int]:
        """A prompt of exactly this length."""


@dataclass(frozen=True)
class ModelTexts:
    """Texts for a model that knows language."""

    tokenizer: PreTrainedTokenizerBase
    chats: Sequence[Sequence[int]]
    book: Sequence[int]

    @classmethod
    def load(cls, tokenizer: PreTrainedTokenizerBase) -> ModelTexts:
        """Reads the prompts of `generate.py`, and the book."""
        prompts = load_prompts(_BENCHMARKS / "prompts.txt", tokenizer)
        book = tokenizer(BOOK.read_text(encoding="utf-8"))["input_ids"]
        return cls(tokenizer, [prompt.token_ids for prompt in prompts], book)

    def batch(self, context: int, rows: int, turn: int) -> list[list[int]]:
        """Chat prompts, or for longer contexts a passage and what to do with it."""
        numbers = range(turn * rows, (turn + 1) * rows)
        if context <= _CHAT_CONTEXT:
            return [list(self.chats[number % len(self.chats)]) for number in numbers]
        length = context - len(encode(self.tokenizer, _QUESTION))
        return [self._about_passage(length, number) for number in numbers]

    def _about_passage(self, length: int, number: int) -> list[int]:
        passage = self.tokenizer.decode(_passage(self.book, length, number))
        return encode(self.tokenizer, f"{passage}\n\n{_QUESTION}")

    def prefill(self, length: int, turn: int) -> list[int]:
        """A passage alone."""
        return _passage(self.book, length, turn)


@dataclass(frozen=True)
class RandomTexts:
    """Texts for a model with random weights."""

    vocabulary: int

    def batch(self, context: int, rows: int, turn: int) -> list[list[int]]:
        """Prompts of exactly that length."""
        random = np.random.default_rng([context, rows, turn])
        return [self._tokens(random, context) for _ in range(rows)]

    def prefill(self, length: int, turn: int) -> list[int]:
        """One prompt."""
        return self._tokens(np.random.default_rng([length, turn]), length)

    def _tokens(self, random: np.random.Generator, length: int) -> list[int]:
        return [int(token) for token in random.integers(0, self.vocabulary, length)]


def _passage(book: Sequence[int], length: int, number: int) -> list[int]:
    begin = number * _STRIDE % (len(book) - length)
    return list(book[begin : begin + length])
