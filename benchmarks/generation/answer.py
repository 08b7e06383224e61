"""What a contender hands back for one prompt, and how its steps are timed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from time import perf_counter, process_time

__all__ = ["Answer", "StepClock"]


@dataclass(frozen=True, kw_only=True)
class Answer:
    """One prompt's greedy answer; the first step is the prefill, all others decode."""

    token_ids: list[int]
    first_step_s: float
    step_times_s: list[float]
    """Wall time of each decode step, from the arrival of one step's tokens to the next's."""
    graph_times_s: list[float] | None
    """Time of each decode step inside the compiled graph, where it is known."""
    step_tokens: list[int]
    """Tokens that each decode step brought."""
    mean_acceptance_length: float
    """1 + accepted drafts per decode step."""
    cpu_s: float
    """Processor time of all threads in the decode steps."""


@dataclass
class StepClock:
    """Takes the time whenever a step's tokens have arrived.

    Every contender is timed this way, so what its host code does between two
    steps counts as part of a step.
    """

    _arrivals: list[tuple[float, int]] = field(default_factory=list)
    _first_cpu_s: float = 0.0
    _last_cpu_s: float = 0.0

    def start(self) -> None:
        """Begins a prompt."""
        self._arrivals = [(perf_counter(), 0)]

    def tick(self, num_tokens: int) -> None:
        """Ends a step; one without tokens is a part of the next."""
        if num_tokens == 0:
            return
        self._arrivals.append((perf_counter(), num_tokens))
        self._last_cpu_s = process_time()
        if len(self._arrivals) == 2:
            self._first_cpu_s = self._last_cpu_s

    def answer(
        self,
        token_ids: Sequence[int],
        *,
        mean_acceptance_length: float | None = None,
        graph_times_s: list[float] | None = None,
    ) -> Answer:
        """Sums up the prompt that `start` began.

        Args:
            token_ids: the answer, EOS included.
            mean_acceptance_length: None: the mean number of tokens of a decode step.
            graph_times_s: of each decode step.
        """
        first, *decode_s = [end - start for (start, _), (end, _) in pairwise(self._arrivals)]
        step_tokens = [count for _, count in self._arrivals[2:]]
        if mean_acceptance_length is None:
            mean_acceptance_length = sum(step_tokens) / max(len(step_tokens), 1)
        return Answer(
            token_ids=list(token_ids),
            first_step_s=first,
            step_times_s=decode_s,
            graph_times_s=graph_times_s,
            step_tokens=step_tokens,
            mean_acceptance_length=mean_acceptance_length,
            cpu_s=self._last_cpu_s - self._first_cpu_s,
        )
