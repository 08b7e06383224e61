"""The figures of one call, made of its answers and of the steps that it took part in."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from unispec.pipelines.runtime.metrics import Acceptance, StepTimes, typical
from unispec.pipelines.runtime.proposals import SOURCES
from unispec.pipelines.runtime.speculating import DraftCount
from unispec.pipelines.runtime.speculation import Speculation

from .answer import Answer
from .requests import Report, SpeculationReport

__all__ = ["report_on", "report_on_speculation"]


def report_on(
    answers: Sequence[Answer],
    steps: Sequence[StepTimes],
    *,
    started_s: float,
    ended_s: float,
    speculation: SpeculationReport | None,
) -> Report:
    """What a call measured.

    Args:
        answers: all of them complete, in the order of its requests.
        steps: in their order, those in which a prompt was read too.
        started_s: on the clock of `time.perf_counter`.
        ended_s: likewise.
        speculation: what `report_on_speculation` says.
    """
    results = [answer.result for answer in answers]
    acceptance = Acceptance.of_all([answer.row.acceptance for answer in answers])
    decode_steps = [step for step in steps if step.is_decode]
    tokens = sum(len(result.token_ids) for result in results)
    return Report(
        results=results,
        acceptance_per_position=acceptance.per_position,
        mean_acceptance_length=acceptance.mean_length,
        tokens_per_second=tokens / (ended_s - started_s),
        time_to_first_token_s=steps[0].ended_s - started_s if steps else 0.0,
        step_time_s=typical(step.wall_s for step in decode_steps),
        graph_time_s=typical(step.graph_s for step in decode_steps),
        steps=len(decode_steps),
        decode_steps=decode_steps,
        speculation=speculation,
    )


def report_on_speculation(
    speculation: Speculation | None,
    count: DraftCount,
    answers: Sequence[Answer],
    steps: Sequence[StepTimes],
) -> SpeculationReport | None:
    """Who proposed in a call; None without a speculative method.

    Args:
        speculation: of the pipeline.
        count: K as it is set.
        answers: of the call.
        steps: likewise; decode steps count.
    """
    if speculation is None:
        return None
    known = [answer.row.speculation for answer in answers if answer.row.speculation]
    decode_steps = [step for step in steps if step.is_decode]
    choice = speculation.choice
    return SpeculationReport(
        num_speculative_tokens=count,
        sources={
            source: Acceptance.of_all([one.acceptance[source] for one in known])
            for source in SOURCES
        },
        steps_by_verified=Counter(step.num_verified for step in decode_steps),
        steps_by_proposed=Counter(step.num_proposed for step in decode_steps),
        expected_tokens_per_second=() if choice is None else choice.rates,
    )
