"""How many drafts a step verifies and how many it proposes, so that most tokens come a second."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from .costs import StepCost

__all__ = ["Choice", "RowOutlook", "best_choice"]

Tokens = npt.NDArray[np.float64]


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
    verify, propose = cost.verify, cost.propose
    # [K + 1, W + 1]: of k proposals and a width of w, the smaller number is verified.
    verified = np.minimum.outer(np.arange(len(propose)), np.arange(len(verify)))
    tokens: Tokens = np.full(verified.shape, float(len(rows)))
    at_hand: Tokens = np.zeros(len(verify))
    for row in rows:
        drafted = np.asarray(row.proposed)[verified]
        if row.matched is not None:
            matched = np.maximum(drafted, row.matched)
            drafted = drafted + row.match_share * (matched - drafted)
        tokens += drafted
        at_hand += row.at_hand
    rates = tokens / (verify + propose[:, None])
    best = int(np.argmax(rates))
    return Choice(
        width=int(np.argmax(at_hand - rates.flat[best] * verify)),
        proposals=best // len(verify),
        rates=rates.max(axis=0).tolist(),
    )
