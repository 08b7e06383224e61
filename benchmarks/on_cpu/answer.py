"""What a contender hands back for the prompts of one batch, and how it is timed.

Imports the standard library only: also interpreters without unispec run it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from time import perf_counter

__all__ = ["Answer", "Arrivals"]


@dataclass(frozen=True, kw_only=True)
class Answer:
    """Greedy answers to the prompts of one batch."""

    token_ids: list[list[int]]
    first_token_s: float
    """Until every prompt had its first token."""
    decode_s: float
    """From then until the first answer was complete: all prompts were decoded all the time."""
    decode_tokens: int
    """Tokens of all answers in that time."""
    acceptance_length: float
    """Tokens that a step brought to an answer in the mean; 1 without speculation."""


@dataclass
class Arrivals:
    """When tokens of each answer arrived."""

    _begin: float = 0.0
    _ticks: list[list[tuple[float, int]]] = field(default_factory=list)
    """Of each answer, time and tokens of each step that brought some."""

    def start(self, rows: int) -> None:
        """Begins a batch."""
        self._ticks = [[] for _ in range(rows)]
        self._begin = perf_counter()

    def tick(self, row: int, tokens: int, at: float | None = None) -> None:
        """Tokens of an answer have arrived, now if no time is given."""
        if tokens:
            self._ticks[row].append((perf_counter() if at is None else at, tokens))

    def answer(
        self, token_ids: Sequence[Sequence[int]], acceptance_length: float | None = None
    ) -> Answer:
        """Sums up the batch that `start` began.

        Args:
            acceptance_length: None: the mean number of tokens that arrived together.
        """
        begin = max(ticks[0][0] for ticks in self._ticks)
        end = min(ticks[-1][0] for ticks in self._ticks)
        decoded = [n for ticks in self._ticks for at, n in ticks if begin < at <= end]
        if acceptance_length is None:
            later = [n for ticks in self._ticks for _, n in ticks[1:]]
            acceptance_length = sum(later) / len(later) if later else 1.0
        return Answer(
            token_ids=[list(ids) for ids in token_ids],
            first_token_s=begin - self._begin,
            decode_s=end - begin,
            decode_tokens=sum(decoded),
            acceptance_length=acceptance_length,
        )
