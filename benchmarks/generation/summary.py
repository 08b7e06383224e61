"""Medians, spreads and ratios of the runs of all contenders."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

from .contenders import MAX, TARGET_ALONE

__all__ = ["Run", "Spread", "Summary", "summarise"]


@dataclass(frozen=True)
class Spread:
    """A quantity over the repeats."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """The median and the extremes of at least one value."""
        return cls(median(values), min(values), max(values))


@dataclass(frozen=True, kw_only=True)
class Run:
    """One process of one contender, all prompts together."""

    process_s: float
    load_s: float
    peak_rss_bytes: int
    load_average: float
    """Of the machine, one minute, just before the process started."""
    tokens: int
    tokens_per_second: float
    """Of the decode steps; a prompt's first token belongs to its prefill."""
    step_time_s: float
    """Median over the decode steps."""
    mean_step_time_s: float
    graph_time_s: float | None
    """Median over the decode steps."""
    mean_acceptance_length: float
    busy_cores: float
    """Processor time over wall time of the decode steps."""
    acceptance_by_kind: dict[str, float]

    @classmethod
    def of(
        cls, result: Mapping[str, Any], kinds: Sequence[str], *, process_s: float, load: float
    ) -> Run:
        """Sums up a worker's result; `kinds` names the kind of each prompt."""
        answers = result["answers"]
        steps = [time for answer in answers for time in answer["step_times_s"]]
        graph = [time for answer in answers for time in answer["graph_times_s"] or ()]
        return cls(
            process_s=process_s,
            load_s=result["load_s"],
            peak_rss_bytes=result["peak_rss_bytes"],
            load_average=load,
            tokens=sum(len(answer["token_ids"]) for answer in answers),
            tokens_per_second=sum(sum(a["step_tokens"]) for a in answers) / sum(steps),
            step_time_s=median(steps),
            mean_step_time_s=sum(steps) / len(steps),
            graph_time_s=median(graph) if graph else None,
            mean_acceptance_length=_acceptance(answers),
            busy_cores=sum(answer["cpu_s"] for answer in answers) / sum(steps),
            acceptance_by_kind={
                kind: _acceptance([a for a, k in zip(answers, kinds, strict=True) if k == kind])
                for kind in dict.fromkeys(kinds)
            },
        )


def _acceptance(answers: Sequence[Mapping[str, Any]]) -> float:
    """Mean acceptance length, every decode step with the same weight."""
    steps = [len(answer["step_times_s"]) for answer in answers]
    lengths = [answer["mean_acceptance_length"] for answer in answers]
    total = sum(steps)
    return sum(n * x for n, x in zip(steps, lengths, strict=True)) / total if total else 1.0


@dataclass(frozen=True, kw_only=True)
class Summary:
    """One contender over all repeats; a ratio is taken within a repeat, then over repeats."""

    tokens_per_second: Spread
    process_s: Spread
    step_time_s: Spread
    graph_time_s: Spread | None
    graph_share: Spread | None
    """Graph time over step time."""
    mean_acceptance_length: float
    acceptance_by_kind: dict[str, float]
    busy_cores: float
    step_time_to_target: Spread | None
    """Step time over that of the target alone."""
    speed_to_target: Spread | None
    """Tokens per second over those of the target alone."""
    speed_to_max: Spread | None
    break_even_to_target: float | None
    """Mean acceptance length at which this equals the target alone in tokens per second.

    A step that takes as long as L steps of the other must bring L tokens: the ratio of
    the mean step times.
    """
    break_even_to_max: float | None


def summarise(runs: Mapping[str, Sequence[Run]]) -> dict[str, Summary]:
    """Compares contenders; the runs of each are in the order of the repeats."""
    target, peer = runs.get(TARGET_ALONE), runs.get(MAX)
    return {name: _summary(own, target, peer) for name, own in runs.items()}


def _summary(
    runs: Sequence[Run], target: Sequence[Run] | None, peer: Sequence[Run] | None
) -> Summary:
    graph = [run.graph_time_s for run in runs if run.graph_time_s is not None]
    shares = [run.graph_time_s / run.step_time_s for run in runs if run.graph_time_s is not None]
    return Summary(
        tokens_per_second=Spread.of([run.tokens_per_second for run in runs]),
        process_s=Spread.of([run.process_s for run in runs]),
        step_time_s=Spread.of([run.step_time_s for run in runs]),
        graph_time_s=Spread.of(graph) if graph else None,
        graph_share=Spread.of(shares) if shares else None,
        mean_acceptance_length=median(run.mean_acceptance_length for run in runs),
        acceptance_by_kind=runs[0].acceptance_by_kind,
        busy_cores=median(run.busy_cores for run in runs),
        step_time_to_target=_ratio("step_time_s", runs, target),
        speed_to_target=_ratio("tokens_per_second", runs, target),
        speed_to_max=_ratio("tokens_per_second", runs, peer),
        break_even_to_target=_median_ratio("mean_step_time_s", runs, target),
        break_even_to_max=_median_ratio("mean_step_time_s", runs, peer),
    )


def _ratio(name: str, runs: Sequence[Run], others: Sequence[Run] | None) -> Spread | None:
    if others is None:
        return None
    pairs = zip(runs, others, strict=True)
    return Spread.of([getattr(run, name) / getattr(other, name) for run, other in pairs])


def _median_ratio(name: str, runs: Sequence[Run], others: Sequence[Run] | None) -> float | None:
    ratio = _ratio(name, runs, others)
    return None if ratio is None else ratio.median
