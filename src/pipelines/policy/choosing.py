"""How many drafts a step verifies and how many it proposes, so that most tokens come a second."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np

from .costs import StepCost

__all__ = ["Choice", "GoingRate", "RowOutlook", "best_choice"]

# What a step weighs after the next one, and how many steps a guess counts as.
_DECAY: Final = 0.95
_GUESSED_STEPS: Final = 4
# From so many rows on NumPy is faster, though nothing of it is in the caches between two executions
# of a graph.
_MANY_ROWS: Final = 8


@dataclass(frozen=True)
class RowOutlook:
    """What is expected of a row: at [n], the tokens that come true if n are verified.

    W is the most drafts that a step verifies, K the most that it proposes.
    """

    at_hand: Sequence[float]
    """`[W + 1]`: of what this step can verify."""
    proposed: Sequence[float]
    """`[K + 1]`: of what the draft would propose now, for the next step."""
    matched: Sequence[float] | None = None
    """`[W + 1]`: of a match in the next step; None: none is expected."""
    match_share: float = 0.0
    """How probable it is, 0 to 1, that the next step has that match."""


@dataclass(frozen=True)
class Choice:
    """What a step does."""

    width: int
    """Drafts a row that are verified, at most."""
    proposals: int
    """Tokens a row that the draft proposes."""
    rates: Sequence[float]
    """`[W + 1]`: tokens a second, all rows together, that are expected of steps that verify 0, 1,
    ... W drafts a row, with the number of proposals that is best for it."""
    one_more_could_pay: bool = False
    """Whether one proposal more would be best if it failed half as often as is expected."""
    one_more_right_would_pay: bool = False
    """Whether it would be best if it never failed."""


class GoingRate:
    """Tokens a second that the last steps brought, by which a second of the next one is priced."""

    def __init__(self) -> None:
        self._rows = 0
        self._tokens = 0.0
        self._seconds = 0.0

    def after(self, rows: int, tokens: int, seconds: float) -> None:
        """Takes note of a step; one with another number of rows begins anew.

        Args:
            rows: of the batch.
            tokens: that it brought, all rows together.
            seconds: that it was expected to take.
        """
        if rows != self._rows:
            self._rows, self._tokens, self._seconds = rows, 0.0, 0.0
        self._tokens = self._tokens * _DECAY + tokens
        self._seconds = self._seconds * _DECAY + seconds

    def value(self, rows: int, guess: float, step: float) -> float:
        """The rate of a batch, where a guess counts as some steps.

        Args:
            rows: of the batch.
            guess: tokens a second.
            step: seconds of a step.
        """
        known, weight = rows == self._rows, _GUESSED_STEPS * step
        tokens, seconds = (self._tokens, self._seconds) if known else (0.0, 0.0)
        return (tokens + guess * weight) / (seconds + weight)


def best_choice(
    rows: Sequence[RowOutlook], cost: StepCost, going: GoingRate | None = None
) -> Choice:
    """The choice that makes the most tokens a second, if the estimates are right.

    A second is worth the tokens that it brings on the whole, as in fractional programming (W.
    Dinkelbach, "On nonlinear fractional programming", 1967). What is proposed pays in the next
    step: the number of proposals is chosen for which that step, with the width that is best then,
    brings the most beyond what its time and that of proposing are worth. This step verifies as
    many of the drafts at hand as bring more than their time is worth.

    Args:
        rows: one at least.
        cost: of a step with so many rows.
        going: what the last steps brought; None: what the best choice is expected to bring.
    """
    widths = range(len(cost.verify))
    proposed = [sum(each) for each in zip(*(row.proposed for row in rows), strict=True)]
    at_hand = [sum(each) for each in zip(*(row.at_hand for row in rows), strict=True)]
    matches = [
        (row.matched, row.proposed, row.match_share) for row in rows if row.matched is not None
    ]
    more = _brought_by_matches(matches, len(proposed), len(widths))
    rates = [len(rows) / seconds for seconds in cost.both[0]]
    steps: list[list[tuple[float, float]]] = []
    for count, times in enumerate(cost.both):
        steps.append([])
        # Without a match there is no more to verify than was proposed.
        for width in widths if matches else widths[: count + 1]:
            used = min(count, width)
            expected = len(rows) + proposed[used] + more[used][width]
            steps[count].append((expected, times[width]))
            rates[width] = max(rates[width], expected / times[width])
    rate = max(rates)
    if going is not None:
        rate = going.value(len(rows), rate, cost.both[0][0])
    gains = [max(brought - rate * seconds for brought, seconds in each) for each in steps]
    proposals = max(range(len(gains)), key=lambda count: gains[count])
    brought = [len(rows), *proposed]
    return Choice(
        width=max(widths, key=lambda width: at_hand[width] - rate * cost.both[0][width]),
        proposals=proposals,
        rates=rates,
        one_more_could_pay=_one_more_pays(0.5, proposals, brought, cost, rates),
        one_more_right_would_pay=_one_more_pays(0.0, proposals, brought, cost, rates),
    )


def _one_more_pays(
    failures: float,
    proposals: int,
    brought: Sequence[float],
    cost: StepCost,
    rates: Sequence[float],
) -> bool:
    """Whether one proposal more would be best if it failed less often.

    Args:
        failures: the share of its failures that would stay.
        brought: the number of rows, then what 0, 1, ... K proposals bring beside a token each.
    """
    count = proposals + 1
    if count >= len(cost.both):
        return False
    rows, *proposed = brought
    reached = proposed[proposals] - proposed[proposals - 1] if proposals else rows
    expected = proposed[count] - proposed[proposals]
    hopeful = reached - failures * (reached - expected)
    width = min(count, len(rates) - 1)
    return (rows + proposed[proposals] + hopeful) / cost.both[count][width] > max(rates)


def _brought_by_matches(
    matches: Sequence[tuple[Sequence[float], Sequence[float], float]], counts: int, widths: int
) -> list[list[float]]:
    """Tokens that matches are expected to bring beyond what n proposals of a draft bring.

    Args:
        matches: of each row what its match brings, what its proposals bring, and how probable it
            is that the match is there.
        counts: n, from 0, to so many less one.
        widths: of the match likewise.

    Returns:
        By n, and then by the tokens of the match that are verified.
    """
    if not matches:
        return [[0.0] * widths] * counts
    if len(matches) < _MANY_ROWS:
        return [
            [
                sum(
                    share * (matched[width] - drafted[count])
                    for matched, drafted, share in matches
                    if matched[width] > drafted[count]
                )
                for width in range(widths)
            ]
            for count in range(counts)
        ]
    matched, drafted, share = (np.array(each) for each in zip(*matches, strict=True))
    excess = np.maximum(matched[:, None, :] - drafted[:, :, None], 0.0)  # [R, K + 1, W + 1]
    return np.tensordot(share, excess, 1).tolist()  # type: ignore[no-any-return]
