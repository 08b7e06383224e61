"""Where a reasoning model thinks: between two tokens of its vocabulary."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from transformers import PreTrainedTokenizerFast
from typing_extensions import Self

from unispec.errors import InputError

__all__ = ["ThinkingTokens"]


@dataclass(frozen=True)
class ThinkingTokens:
    """The tokens between which a model thinks."""

    start: int
    """Opens a thinking block."""
    end: int
    """Closes it."""

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerFast, names: tuple[str, str]) -> Self:
        """Looks the tokens up.

        Args:
            names: what opens a block and what closes it.

        Raises:
            InputError: the tokenizer has no such token.
        """
        vocabulary = tokenizer.get_vocab()
        for name in names:
            if name not in vocabulary:
                raise InputError(
                    f"thinking token {name!r} is not in the tokenizer's vocabulary; give the"
                    " tokens between which this model thinks, or use no relaxed acceptance"
                )
        start, end = names
        return cls(vocabulary[start], vocabulary[end])

    def up_to_end(self, tokens: list[int]) -> list[int]:
        """Those of a block's tokens up to the one that closes it, or all."""
        if self.end not in tokens:
            return tokens
        return tokens[: tokens.index(self.end) + 1]

    def inside(self, tokens: Iterable[int], before: bool = False) -> bool:
        """Whether what follows some tokens is inside a block.

        Args:
            before: whether the first of them is inside one.
        """
        for token in tokens:
            if token == self.start:
                before = True
            elif token == self.end:
                before = False
        return before
