"""How many drafts a step verifies and how many it proposes, so that most tokens come a second."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from .costs import StepCost

__all__ = ["Choice", "RowOutlook", "best_choice"]


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


def best_choice(rows: Sequence[RowOutlook], cost: StepCost) -> Choice:
    """The choice that makes the most tokens a second, if the estimates are right.

    What is proposed pays in the next step: of all pairs of a number of proposals and a width, the
    one with the highest rate of tokens per second is looked for, as if all steps were like it.
    That rate is what a second is worth. This step then verifies as many of the drafts at hand as
    bring more than their time is worth.

    Args:
        rows: one at least.
        cost: of a step with so many rows.
    """
    # Plain numbers: between two executions of a graph nothing of NumPy is in the caches.
    widths = range(len(cost.verify))
    proposed = [sum(each) for each in zip(*(row.proposed for row in rows), strict=True)]
    at_hand = [sum(each) for each in zip(*(row.at_hand for row in rows), strict=True)]
    matching = [row for row in rows if row.matched is not None]
    rates = [0.0] * len(cost.verify)
    best, proposals = 0.0, 0
    for count, times in enumerate(cost.both):
        for width in widths:
            used = min(count, width)
            tokens = len(rows) + proposed[used]
            for row in matching:
                if row.matched is not None and row.matched[width] > row.proposed[used]:
                    tokens += row.match_share * (row.matched[width] - row.proposed[used])
            rate = tokens / times[width]
            if rate > rates[width]:
                rates[width] = rate
                if rate > best:
                    best, proposals = rate, count
    width = max(widths, key=lambda width: at_hand[width] - best * cost.both[0][width])
    return Choice(width=width, proposals=proposals, rates=rates)
