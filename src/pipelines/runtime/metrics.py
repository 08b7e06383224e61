"""Acceptance and timing of a run."""

from __future__ import annotations

from dataclasses import dataclass, field
from math import nan
from statistics import median

__all__ = ["RunMetrics"]


@dataclass
class RunMetrics:
    """What a run accepted and how long its steps took.

    A verification is one row's share of a step that verified drafts of that row; a
    decode step is a step in which no row was in prefill.
    """

    verifications: int = 0
    """How many there were."""
    accepted: int = 0
    """Draft tokens that they accepted together."""
    accepted_at: list[int] = field(default_factory=list)
    """How often the draft at each position was accepted."""
    step_times_s: list[float] = field(default_factory=list)
    """Wall time of each decode step, from one step's start to its end."""
    graph_times_s: list[float] = field(default_factory=list)
    """Time of each decode step inside the compiled graph."""

    def verified(self, drafted: int, accepted: int) -> None:
        """Counts one verification of `drafted` tokens of which the first `accepted` stood."""
        self.verifications += 1
        self.accepted += accepted
        self.accepted_at += [0] * (drafted - len(self.accepted_at))
        for position in range(accepted):
            self.accepted_at[position] += 1

    @property
    def mean_acceptance_length(self) -> float:
        """Tokens per verification: 1 + accepted drafts."""
        return 1.0 + self.accepted / self.verifications if self.verifications else 1.0

    @property
    def acceptance_per_position(self) -> list[float]:
        """Share of verifications that accepted the draft at each position."""
        return [count / self.verifications for count in self.accepted_at]

    @property
    def step_time_s(self) -> float:
        """Median wall time of a decode step; NaN if there was none."""
        return median(self.step_times_s) if self.step_times_s else nan

    @property
    def graph_time_s(self) -> float:
        """Median time of a decode step inside the graph; NaN if there was none."""
        return median(self.graph_times_s) if self.graph_times_s else nan
