"""What must hold of an engine's answers and proposals on any device, in any number format.

The engine's graph may compute in another format than the reference, which is float32: then the
reference's `tie_gap` says how far the two may be apart.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from draft_judges import Judge, recording
from max.driver import Buffer
from max.pipelines.context import SamplingParams, TextContext
from prompts import random_prompt
from reference.target import TargetReference, assert_same_greedy
from runs import answers, greedy_requests, proposing, scheduled
from uniform_places import p_values, places

from unispec.engine import Engine, Request
from unispec.pipelines.runtime.draft_probs import DraftProbs

__all__ = ["GreedyAnswers", "SampledAnswers", "greedy_answers", "proposals", "sampled_answers"]

LENGTHS = (1, 2, 5, 63, 64, 65, 127, 128, 129, 200, 257, 300)
"""Of the prompts; around chunks of 64 and pages of 128 tokens."""

NEW_TOKENS = 32
GIVEN = 2
"""Right drafts that rows are given in each step, where drafts are given."""


class GreedyAnswers(NamedTuple):
    """Of each prompt, whether its answer is the target's to the last token."""

    drafted: list[bool]
    """Where the draft proposes, one token and as many as it can, alone and in a batch."""
    given: list[bool]
    """Where all drafts are right."""
    alone: list[bool]
    """Where nothing is drafted, so that each step brings a token: the same graph."""
    as_alone: list[bool]
    """Not the reference's, but whether it is what the same graph answers without drafts."""


class SampledAnswers(NamedTuple):
    """How likely it is that right answers are as far from the target's law."""

    least_p_value: float
    accepted: float
    """Share of the draft's first proposals that stood."""


def greedy_answers(engine: Engine, target: TargetReference) -> GreedyAnswers:
    """Asserts that all answers are the target's up to near-ties, with and without drafts."""
    vocab_size = len(target.embedding)
    prompts = [random_prompt(vocab_size, length, seed=21) for length in LENGTHS]
    requests = greedy_requests(prompts, NEW_TOKENS, ignore_eos=True)
    right = {
        tuple(prompt): target.greedy(prompt, NEW_TOKENS + GIVEN, set()).token_ids
        for prompt in prompts
    }

    def same(found: Sequence[list[int]]) -> list[bool]:
        traces = [
            target.greedy(prompt, NEW_TOKENS, set(), guess=answer)
            for prompt, answer in zip(prompts, found, strict=True)
        ]
        return [assert_same_greedy(*pair) for pair in zip(found, traces, strict=True)]

    def give(contexts: Sequence[TextContext]) -> None:
        for context in contexts:
            row = engine.pipeline.model.batch.row(context)
            if row.generated:
                known = right[tuple(context.tokens.prompt.tolist())]
                row.drafts = list(known[row.generated :][:GIVEN])
                probs = np.eye(vocab_size, dtype=np.float32)[[row.drafts]]
                row.draft_probs = DraftProbs(Buffer.from_numpy(probs), 0)

    with scheduled(engine, [0]) as steps:
        alone = answers(engine, requests)
    assert not any(any(step.drafts) for step in steps)
    with scheduled(engine, [0, 0, 0, 1], give) as steps:
        given = answers(engine, requests)
    assert sum(map(sum, (step.drafts for step in steps))) > 0
    drafted = []
    for k, batch_size in ((1, len(prompts)), (engine.max_speculative_tokens, 1), (2, 5)):
        with proposing(engine, min(k, engine.max_speculative_tokens)):
            drafted.append(answers(engine, requests, batch_size))
    return GreedyAnswers(
        drafted=[one for found in drafted for one in same(found)],
        given=same(given),
        alone=same(alone),
        as_alone=[
            one == other for found in drafted for one, other in zip(found, alone, strict=True)
        ],
    )


def proposals(engine: Engine, judge: Judge, k: int) -> list[bool]:
    """Asserts that what the draft proposes is right up to near-ties.

    Args:
        k: Proposals a step.

    Returns:
        Of each step of each request, whether all K are the reference's.
    """
    vocab_size = len(judge.target.embedding)
    prompts = [random_prompt(vocab_size, length, seed=22) for length in LENGTHS]
    with proposing(engine, k), recording(engine) as recorded:
        answers(engine, greedy_requests(prompts, 16, ignore_eos=True))
    assert len(recorded) == len(prompts)
    assert {len(step.drafts) for steps in recorded.values() for step in steps} == {k}
    return judge.judge_all(recorded)


@torch.inference_mode()
def sampled_answers(engine: Engine, target: TargetReference, temperature: float) -> SampledAnswers:
    """Samples from prompts of five tokens and compares with the target's law, given each prefix."""
    vocab_size = len(target.embedding)
    requests = [
        Request(
            token_ids=random_prompt(vocab_size, 5, seed=seed),
            sampling=SamplingParams(
                seed=seed, temperature=temperature, max_new_tokens=NEW_TOKENS + 1, ignore_eos=True
            ),
        )
        for seed in range(100)
    ]
    with proposing(engine, min(3, engine.max_speculative_tokens)):
        report = engine.generate(requests)
    found = places(target, requests, report, temperature=temperature)
    # No draft was verified for the first token of an answer.
    return SampledAnswers(min(p_values(found[:, 1:])), report.acceptance_per_position[0])
