"""When the steps of a batch ended, and what is counted of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from time import perf_counter

__all__ = ["Steps", "Timed"]


@dataclass(frozen=True, kw_only=True)
class Timed:
    """Decode steps in which every row of the batch took part."""

    seconds: list[float]
    """From the end of the step before to the end of each."""
    tokens: list[int]
    """Of all rows together, of each step."""


@dataclass
class Steps:
    """Takes down the steps of one batch as they end.

    What is between two steps counts, the host's part too.
    """

    rows: int
    _ends: list[tuple[float, Sequence[int]]] = field(default_factory=list)

    def ended(self, tokens: Sequence[int], at: float | None = None) -> None:
        """A step has ended, now if no time is given.

        Args:
            tokens: how many it brought to each row that it had.
        """
        self._ends.append((perf_counter() if at is None else at, tokens))

    def timed(self) -> Timed:
        """The steps that count: all rows got tokens, in the step before as well.

        So neither prompts count nor what comes when a first answer is complete.

        Raises:
            RuntimeError: there is none.
        """
        full = [len(tokens) == self.rows and all(tokens) for _, tokens in self._ends]
        counted = [at for at in range(1, len(full)) if full[at - 1] and full[at]]
        if not counted:
            raise RuntimeError(f"no two steps in a row brought tokens to all of {self.rows} rows")
        return Timed(
            seconds=[self._ends[at][0] - self._ends[at - 1][0] for at in counted],
            tokens=[sum(self._ends[at][1]) for at in counted],
        )
