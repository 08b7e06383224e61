"""What requests accepted, and how long steps took."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from math import nan
from statistics import median

__all__ = ["Acceptance", "StepTimes", "typical"]


@dataclass(frozen=True)
class StepTimes:
    """When one step was, and of which kind."""

    started_s: float
    """On the clock of `time.perf_counter`."""
    ended_s: float
    """Likewise."""
    graph_s: float
    """Of that, inside the compiled graph."""
    is_decode: bool
    """Whether no row was in prefill."""
    num_rows: int = 1
    """Requests of the batch."""
    num_verified: int = 0
    """Drafts a row that it verified, the most of any."""
    num_proposed: int = 0
    """K: tokens a row that the draft proposed in it."""

    @property
    def wall_s(self) -> float:
        """From the step's start to its end."""
        return self.ended_s - self.started_s


def typical(seconds: Iterable[float]) -> float:
    """The median; NaN of none."""
    values = list(seconds)
    return median(values) if values else nan


@dataclass
class Acceptance:
    """What became of the drafts of a request, or of several.

    A verification is one row's share of a step that verified drafts of that row.
    """

    verifications: int = 0
    """How many there were."""
    drafted: int = 0
    """Draft tokens that they verified together."""
    accepted_at: list[int] = field(default_factory=list)
    """How often the draft at each position was accepted."""

    @classmethod
    def of_all(cls, requests: Sequence[Acceptance]) -> Acceptance:
        """What became of the drafts of several requests."""
        longest = max((len(one.accepted_at) for one in requests), default=0)
        return cls(
            verifications=sum(one.verifications for one in requests),
            drafted=sum(one.drafted for one in requests),
            accepted_at=[
                sum(one.accepted_at[at] for one in requests if at < len(one.accepted_at))
                for at in range(longest)
            ],
        )

    def verified(self, drafted: int, accepted: int) -> None:
        """Counts one verification of `drafted` tokens of which the first `accepted` stood."""
        self.verifications += 1
        self.drafted += drafted
        self.accepted_at += [0] * (drafted - len(self.accepted_at))
        for position in range(accepted):
            self.accepted_at[position] += 1

    @property
    def accepted(self) -> int:
        """Draft tokens that were accepted."""
        return sum(self.accepted_at)

    @property
    def totals(self) -> tuple[int, int]:
        """Draft tokens that were verified, and how many of them were accepted."""
        return self.drafted, self.accepted

    def since(self, before: tuple[int, int]) -> tuple[int, int]:
        """How much the `totals` have grown."""
        return self.drafted - before[0], self.accepted - before[1]

    @property
    def mean_length(self) -> float:
        """Tokens per verification: 1 + accepted drafts."""
        return 1.0 + self.accepted / self.verifications if self.verifications else 1.0

    @property
    def per_position(self) -> list[float]:
        """Share of verifications that accepted the draft at each position."""
        return [count / self.verifications for count in self.accepted_at]
