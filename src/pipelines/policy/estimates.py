"""What share of proposals comes true, learned from each step and slowly forgotten."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Final

__all__ = ["DraftEstimate", "MatchEstimate", "Rate", "agreement"]

# Observations that weigh as much as one's own: of all requests, for a row; of a guess, for all.
_SHARED_WEIGHT: Final = 4.0
_GUESS_WEIGHT: Final = 2.0
# What an observation weighs after the next one, of a row and of all requests together.
_ROW_DECAY: Final = 0.95
_SHARED_DECAY: Final = 0.998
# At first every second token of a draft is expected to come true.
_DRAFT_GUESS: Final = 0.5
# Matched tokens from which a class begins, and the share that is expected of it at first.
_CLASSES: Final = ((2, 0.3), (3, 0.4), (4, 0.5), (6, 0.7), (10, 0.8), (18, 0.9))


def agreement(proposed: Sequence[int], emitted: Sequence[int]) -> tuple[int, bool]:
    """How many proposed tokens came true in a row, and whether the next one is known to be wrong.

    Proposals that were not verified are judged, too, as far as the answer has come.
    """
    known = min(len(proposed), len(emitted))
    for position in range(known):
        if proposed[position] != emitted[position]:
            return position, True
    return known, False


@dataclass
class Rate:
    """A share of successes, in which what is long ago weighs less."""

    decay: float
    """What a trial weighs after the next one, in proportion to that; below 1."""
    hits: float = 0.0
    """Successes, by their weight."""
    trials: float = 0.0
    """All trials, likewise."""

    def observe(self, hit: bool) -> None:
        """Counts one trial."""
        self.hits = self.hits * self.decay + hit
        self.trials = self.trials * self.decay + 1.0

    def value(self, guess: float, weight: float) -> float:
        """The share, where a guess counts as `weight` trials."""
        return (self.hits + guess * weight) / (self.trials + weight)


@dataclass
class _Rates:
    """Of all requests, or of one row and, for what it lacks, of all."""

    shared: _Rates | None = None
    guesses: Sequence[float] = ()
    rates: list[Rate] = field(default_factory=list)

    def observe(self, index: int, hit: bool) -> None:
        decay = _SHARED_DECAY if self.shared is None else _ROW_DECAY
        while len(self.rates) <= index:
            self.rates.append(Rate(decay))
        self.rates[index].observe(hit)
        if self.shared is not None:
            self.shared.observe(index, hit)

    def value(self, index: int) -> float:
        if self.shared is None:
            guess, weight = self.guesses[min(index, len(self.guesses) - 1)], _GUESS_WEIGHT
        else:
            guess, weight = self.shared.value(index), _SHARED_WEIGHT
        return self.rates[index].value(guess, weight) if index < len(self.rates) else guess


class DraftEstimate:
    """How far a draft's proposals come true.

    Args:
        shared: of all requests, which learns what this one learns; None: this is it.
    """

    def __init__(self, shared: DraftEstimate | None = None) -> None:
        self._rates: _Rates = _Rates(None if shared is None else shared._rates, (_DRAFT_GUESS,))

    def observe(self, proposed: Sequence[int], emitted: Sequence[int]) -> None:
        """Learns what became of proposals: the tokens that the answer has in their place."""
        hits, failed = agreement(proposed, emitted)
        for position in range(hits):
            self._rates.observe(position, True)
        if failed:
            self._rates.observe(hits, False)

    def expected(self, count: int) -> list[float]:
        """Tokens that are expected to come true of the first 0, 1, ... `count` proposals."""
        sums, product = [0.0], 1.0
        for position in range(count):
            product *= self._rates.value(position)
            sums.append(sums[-1] + product)
        return sums

    @property
    def first(self) -> Rate:
        """Of first proposals."""
        rates = self._rates.rates
        return rates[0] if rates else Rate(_SHARED_DECAY)


class MatchEstimate:
    """How far the continuation of a match comes true, by the tokens that agree before it.

    Args:
        shared: of all requests, which learns what this one learns; None: this is it.
    """

    def __init__(self, shared: MatchEstimate | None = None) -> None:
        guesses = [guess for _, guess in _CLASSES]
        self._rates: _Rates = _Rates(None if shared is None else shared._rates, guesses)

    def observe(self, length: int, proposed: Sequence[int], emitted: Sequence[int]) -> None:
        """Learns what became of the continuation of a match of `length` tokens."""
        hits, failed = agreement(proposed, emitted)
        for position in range(hits):
            self._rates.observe(_class(length + position), True)
        if failed:
            self._rates.observe(_class(length + hits), False)

    def expected(self, length: int, count: int) -> list[float]:
        """Tokens that are expected to come true of the first 0, 1, ... `count` proposals."""
        sums, product = [0.0], 1.0
        for position in range(count):
            product *= self._rates.value(_class(length + position))
            sums.append(sums[-1] + product)
        return sums


def _class(length: int) -> int:
    """Which class a match of so many tokens is in."""
    found = 0
    for index, (start, _) in enumerate(_CLASSES):
        if length >= start:
            found = index
    return found
