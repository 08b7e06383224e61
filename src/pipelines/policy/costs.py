"""What steps cost on this machine."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

__all__ = ["StepCost", "StepCosts"]

Seconds = npt.NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class StepCost:
    """Of a step with a certain number of rows, at a certain length of their sequences."""

    verify: Seconds
    """Seconds `[W + 1]` of a step that verifies 0, 1, ... W drafts a row and proposes none."""
    propose: Seconds
    """Seconds `[K + 1]` that proposing 0, 1, ... K tokens adds."""

    @cached_property
    def both(self) -> list[list[float]]:
        """Seconds of a step by the tokens a row that it proposes, and then by those it verifies."""
        return (self.verify + self.propose[:, None]).tolist()  # type: ignore[no-any-return]


class StepCosts:
    """A table of measured steps; what stands between its entries is interpolated.

    Where more work was measured to take less time, which only noise does, it takes the same.

    Args:
        measured: by rows and tokens of context a row; each number of rows has the same contexts.

    Raises:
        ValueError: nothing was measured.
    """

    def __init__(self, measured: Mapping[tuple[int, int], StepCost]) -> None:
        if not measured:
            raise ValueError("nothing was measured")
        self._rows = sorted({rows for rows, _ in measured})
        self._contexts = sorted({context for _, context in measured})
        self._measured: dict[tuple[int, int], StepCost] = {}
        for row_at, rows in enumerate(self._rows):
            for context_at, context in enumerate(self._contexts):
                less = []
                if row_at:
                    less.append(self._measured[self._rows[row_at - 1], context])
                if context_at:
                    less.append(self._measured[rows, self._contexts[context_at - 1]])
                self._measured[rows, context] = _at_least(measured[rows, context], less)

    def at(self, rows: int, context: float) -> StepCost:
        """The cost of a step.

        Args:
            rows: of the batch.
            context: tokens of a row's sequence, the mean of the batch.
        """
        low, high, share = _between(self._rows, rows)
        found = _mixed(self._at(low, context), self._at(high, context), share)
        # Beyond the last entries each width goes on along a line of its own.
        return _at_least(found, [])

    def _at(self, rows: int, context: float) -> StepCost:
        low, high, share = _between(self._contexts, context)
        return _mixed(self._measured[rows, low], self._measured[rows, high], share)

    def save(self, path: Path) -> None:
        """Writes the table as JSON, whole or not at all."""
        entries = [
            {
                "rows": rows,
                "context": context,
                "verify_s": cost.verify.tolist(),
                "propose_s": cost.propose.tolist(),
            }
            for (rows, context), cost in self._measured.items()
        ]
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_suffix(".part")
        part.write_text(json.dumps(entries, indent=1))
        part.replace(path)

    @classmethod
    def read(cls, path: Path) -> StepCosts | None:
        """A table that was written; None where there is none, or another program's."""
        try:
            entries: Any = json.loads(path.read_text())
            return cls(
                {
                    (int(entry["rows"]), int(entry["context"])): StepCost(
                        np.array(entry["verify_s"], np.float64),
                        np.array(entry["propose_s"], np.float64),
                    )
                    for entry in entries
                }
            )
        except (OSError, ValueError, KeyError, TypeError, OverflowError):
            return None


def _between(knots: Sequence[int], value: float) -> tuple[int, int, float]:
    """The entries on both sides of a value, and how far it is from the first to the second.

    Beyond the last one the line through the last two goes on; before the first one it ends.
    """
    if len(knots) == 1 or value <= knots[0]:
        return knots[0], knots[0], 0.0
    at = min(int(np.searchsorted(knots, value)), len(knots) - 1)
    low, high = knots[at - 1], knots[at]
    return low, high, (value - low) / (high - low)


def _at_least(cost: StepCost, less: Sequence[StepCost]) -> StepCost:
    """The cost of more work than that of each of the others."""
    return StepCost(
        np.maximum.accumulate(np.max([cost.verify, *(one.verify for one in less)], axis=0)),
        np.maximum.accumulate(np.max([cost.propose, *(one.propose for one in less)], axis=0)),
    )


def _mixed(low: StepCost, high: StepCost, share: float) -> StepCost:
    if low is high or share == 0.0:
        return low
    return StepCost(
        low.verify + (high.verify - low.verify) * share,
        low.propose + (high.propose - low.propose) * share,
    )
