"""What share of proposals comes true, learned from each step and slowly forgotten."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

__all__ = ["DraftEstimate", "MatchEstimate", "Rates", "agreement"]

# Observations that weigh as much as one's own: of all requests, for a row; of a guess, for all.
_SHARED_WEIGHT: Final = 4.0
_GUESS_WEIGHT: Final = 2.0
# What an observation weighs after the next one, of a row and of all requests together.
_ROW_DECAY: Final = 0.95
_SHARED_DECAY: Final = 0.998
# At first every second token of a draft is expected to come true.
_DRAFT_GUESS: Final = 0.5
# Matched tokens from which a class begins, and the share that is expected of it at first.
_CLASSES: Final = ((2, 0.3), (3, 0.4), (4, 0.5), (6, 0.7), (9, 0.8), (16, 0.9))


def agreement(proposed: Sequence[int], emitted: Sequence[int]) -> tuple[int, bool]:
    """How many proposed tokens came true in a row, and whether the next one is known to be wrong.

    Proposals that were not verified are judged, too, as far as the answer has come.
    """
    known = min(len(proposed), len(emitted))
    for position in range(known):
        if proposed[position] != emitted[position]:
            return position, True
    return known, False


class Rates:
    """Shares of successes by kind, in which what is long ago weighs less.

    Args:
        guesses: the share of each kind at first; the last one is that of all further kinds.
        shared: of all requests, which learns what this one learns and stands in for what it lacks;
            None: this is it.

    Attributes:
        hits: successes of each kind, by their weight.
        trials: all trials, likewise.
    """

    def __init__(self, guesses: Sequence[float], shared: Rates | None = None) -> None:
        self.hits = [0.0] * len(guesses)
        self.trials = [0.0] * len(guesses)
        self._guesses = list(guesses)
        self._shared = shared
        self._decay = _SHARED_DECAY if shared is None else _ROW_DECAY

    def observe(self, kind: int, hit: bool) -> None:
        """Counts one trial."""
        self._grow(kind + 1)
        self.hits[kind] = self.hits[kind] * self._decay + hit
        self.trials[kind] = self.trials[kind] * self._decay + 1.0
        if self._shared is not None:
            self._shared.observe(kind, hit)

    def expected(self, kinds: Sequence[int]) -> list[float]:
        """Successes expected of trials of these kinds, up to the first failure.

        Returns:
            Of the first 0, 1, ... trials.
        """
        if kinds:
            self._grow(max(kinds) + 1)
        shared = self._shared
        sums, total, product = [0.0], 0.0, 1.0
        # This runs for each row in each step, so there are no calls in it.
        for kind in kinds:
            if shared is None:
                prior, weight = self._guesses[kind], _GUESS_WEIGHT
            else:
                hits = shared.hits[kind] + _GUESS_WEIGHT * self._guesses[kind]
                prior, weight = hits / (shared.trials[kind] + _GUESS_WEIGHT), _SHARED_WEIGHT
            product *= (self.hits[kind] + prior * weight) / (self.trials[kind] + weight)
            total += product
            sums.append(total)
        return sums

    def _grow(self, kinds: int) -> None:
        missing = kinds - len(self.hits)
        if missing > 0:
            self.hits += [0.0] * missing
            self.trials += [0.0] * missing
            self._guesses += self._guesses[-1:] * missing
        if self._shared is not None:
            self._shared._grow(kinds)


class DraftEstimate:
    """How far a draft's proposals come true.

    Args:
        shared: of all requests; None: this is it.

    Attributes:
        rates: by position.
    """

    def __init__(self, shared: DraftEstimate | None = None) -> None:
        self.rates: Rates = Rates((_DRAFT_GUESS,), None if shared is None else shared.rates)

    def observe(self, proposed: Sequence[int], emitted: Sequence[int]) -> None:
        """Learns what became of proposals: the tokens that the answer has in their place."""
        hits, failed = agreement(proposed, emitted)
        for position in range(hits):
            self.rates.observe(position, True)
        if failed:
            self.rates.observe(hits, False)

    def expected(self, count: int) -> list[float]:
        """Tokens that are expected to come true of the first 0, 1, ... `count` proposals."""
        return self.rates.expected(range(count))

    @property
    def first(self) -> tuple[float, float]:
        """Of first proposals, those that came true, and all, by their weight."""
        return self.rates.hits[0], self.rates.trials[0]


class MatchEstimate:
    """How far the continuation of a match comes true, by the tokens that agree before it.

    Args:
        shared: of all requests; None: this is it.

    Attributes:
        rates: by class of length.
    """

    def __init__(self, shared: MatchEstimate | None = None) -> None:
        guesses = [guess for _, guess in _CLASSES]
        self.rates: Rates = Rates(guesses, None if shared is None else shared.rates)

    def observe(self, length: int, proposed: Sequence[int], emitted: Sequence[int]) -> None:
        """Learns what became of the continuation of a match of `length` tokens."""
        hits, failed = agreement(proposed, emitted)
        for position in range(hits):
            self.rates.observe(_class_of(length + position), True)
        if failed:
            self.rates.observe(_class_of(length + hits), False)

    def expected(self, length: int, count: int) -> list[float]:
        """Tokens that are expected to come true of the first 0, 1, ... `count` proposals."""
        return self.rates.expected([_class_of(length + position) for position in range(count)])


def _class_of(length: int) -> int:
    """Which class a match of so many tokens is in."""
    return _CLASS_OF[min(length, len(_CLASS_OF) - 1)]


_CLASS_OF: Final = [
    max((index for index, (start, _) in enumerate(_CLASSES) if length >= start), default=0)
    for length in range(_CLASSES[-1][0] + 1)
]
