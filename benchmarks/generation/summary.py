"""Medians, spreads and ratios of the runs of all contenders."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import mean, median, quantiles

from .answer import Answer
from .contenders import MAX, TARGET_ALONE

__all__ = ["Run", "Spread", "Summary", "summarise"]


@dataclass(frozen=True)
class Spread:
    """A quantity over its samples."""

    median: float
    low: float
    """First quartile."""
    high: float
    """Third quartile."""

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """The quartiles of at least one value."""
        if len(values) == 1:
            return cls(values[0], values[0], values[0])
        low, middle, high = quantiles(values, n=4, method="inclusive")
        return cls(middle, low, high)


@dataclass(kw_only=True)
class Run:
    """One process of one contender; it grows with each answer."""

    load_s: float
    process_s: float
    """Loading and all answers."""
    peak_rss_bytes: int
    """After loading."""
    answers: list[Answer] = field(default_factory=list)


@dataclass(frozen=True, kw_only=True)
class Summary:
    """One contender over all answers of all repeats.

    A ratio is taken between answers to one prompt in one repeat, then over these pairs.
    """

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


def summarise(runs: Mapping[str, Sequence[Run]], kinds: Sequence[str]) -> dict[str, Summary]:
    """Compares contenders.

    Args:
        runs: of each contender in the order of the repeats.
        kinds: of each prompt.
    """
    target, peer = runs.get(TARGET_ALONE), runs.get(MAX)
    return {name: _summary(own, kinds, target, peer) for name, own in runs.items()}


def _summary(
    runs: Sequence[Run],
    kinds: Sequence[str],
    target: Sequence[Run] | None,
    peer: Sequence[Run] | None,
) -> Summary:
    answers = _answers(runs)
    graph = [median(a.graph_times_s) for a in answers if a.graph_times_s]
    shares = [median(a.graph_times_s) / _step(a) for a in answers if a.graph_times_s]
    decode_s = sum(sum(answer.step_times_s) for answer in answers)
    return Summary(
        tokens_per_second=Spread.of([_speed(answer) for answer in answers]),
        process_s=Spread.of([run.process_s for run in runs]),
        step_time_s=Spread.of([_step(answer) for answer in answers]),
        graph_time_s=Spread.of(graph) if graph else None,
        graph_share=Spread.of(shares) if shares else None,
        mean_acceptance_length=_acceptance(answers),
        acceptance_by_kind={
            kind: _acceptance(
                [run.answers[at] for run in runs for at, other in enumerate(kinds) if other == kind]
            )
            for kind in dict.fromkeys(kinds)
        },
        busy_cores=sum(answer.cpu_s for answer in answers) / decode_s,
        step_time_to_target=_ratio(_step, runs, target),
        speed_to_target=_ratio(_speed, runs, target),
        speed_to_max=_ratio(_speed, runs, peer),
        break_even_to_target=_median_ratio(_mean_step, runs, target),
        break_even_to_max=_median_ratio(_mean_step, runs, peer),
    )


def _answers(runs: Sequence[Run]) -> list[Answer]:
    """All answers; one that ended with its first token has no decode step to compare."""
    return [answer for run in runs for answer in run.answers if answer.step_times_s]


def _speed(answer: Answer) -> float:
    """Tokens per second of the decode steps; the first token belongs to the prefill."""
    return sum(answer.step_tokens) / sum(answer.step_times_s)


def _step(answer: Answer) -> float:
    return median(answer.step_times_s)


def _mean_step(answer: Answer) -> float:
    return mean(answer.step_times_s)


def _acceptance(answers: Sequence[Answer]) -> float:
    """Mean acceptance length, every decode step with the same weight."""
    steps = [len(answer.step_times_s) for answer in answers]
    lengths = [answer.mean_acceptance_length for answer in answers]
    return sum(n * x for n, x in zip(steps, lengths, strict=True)) / sum(steps)


def _ratio(
    figure: Callable[[Answer], float], runs: Sequence[Run], others: Sequence[Run] | None
) -> Spread | None:
    if others is None:
        return None
    pairs = zip(_answers(runs), _answers(others), strict=True)
    return Spread.of([figure(own) / figure(other) for own, other in pairs])


def _median_ratio(
    figure: Callable[[Answer], float], runs: Sequence[Run], others: Sequence[Run] | None
) -> float | None:
    ratio = _ratio(figure, runs, others)
    return None if ratio is None else ratio.median
