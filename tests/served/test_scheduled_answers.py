"""What MAX's scheduler lets our pipeline answer is what an engine answers, token by token."""

from __future__ import annotations

import pytest
from max.pipelines.context import GenerationStatus, SamplingParams
from prompts import random_prompt
from scheduling import Scheduled, greedy

from unispec.engine import Engine, Request

pytestmark = pytest.mark.compiles("llama_eagle_agreeing")

LENGTHS = (5, 100, 200, 17, 3, 64, 65, 30)
"""Around chunks of 64 and pages of 128 tokens."""


def prompts() -> list[list[int]]:
    return [random_prompt(256, length, seed=3) for length in LENGTHS]


def sampled(seed: int) -> SamplingParams:
    return SamplingParams(
        temperature=1.1,
        top_k=50,
        top_p=0.95,
        seed=seed,
        presence_penalty=0.4,
        repetition_penalty=1.2,
        min_new_tokens=10,
        max_new_tokens=40,
    )


@pytest.mark.parametrize("kind", ["greedy", "sampled"])
def test_mixed_steps_answer_as_an_engine(
    scheduled: Scheduled, eagle_engine: Engine, kind: str
) -> None:
    """Requests come while others decode, so that steps hold rows of both kinds."""
    params = [greedy() if kind == "greedy" else sampled(seed) for seed in range(len(LENGTHS))]
    contexts = [scheduled.context(*pair) for pair in zip(prompts(), params, strict=True)]
    ids = [context.request_id for context in contexts]
    waiting = contexts[:]
    contexts.clear()

    def come(iteration: int) -> None:
        if waiting and iteration % 3 == 0:
            scheduled.add(waiting.pop(0))

    come(0)
    while waiting:
        scheduled.run(come)
        if waiting:
            scheduled.add(waiting.pop(0))
    scheduled.run()
    expected = eagle_engine.generate(
        [
            Request(token_ids=tokens, sampling=each)
            for tokens, each in zip(prompts(), params, strict=True)
        ]
    ).results
    for request_id, result in zip(ids, expected, strict=True):
        assert scheduled.answer(request_id) == result.token_ids
        last = scheduled.outputs(request_id)[-1].final_status
        ended = result.finish_reason == "stop"
        assert last is (
            GenerationStatus.END_OF_SEQUENCE if ended else GenerationStatus.MAXIMUM_LENGTH
        )


def test_bias_counts_as_in_an_engine(scheduled: Scheduled, eagle_engine: Engine) -> None:
    tokens, bias = random_prompt(256, 9, seed=4), {7: 3.0, 40: -100.0}
    context = scheduled.context(tokens, greedy())
    context.logit_bias = bias  # type: ignore[attr-defined]
    request_id = scheduled.add(context)
    scheduled.run()
    request = Request(token_ids=tokens, sampling=greedy(), logit_bias=bias)
    assert scheduled.answer(request_id) == eagle_engine.generate([request]).results[0].token_ids


def test_a_chunk_brings_no_output(scheduled: Scheduled) -> None:
    """The first output would count as the first token, and be an empty event of a stream."""
    request_id = scheduled.add(scheduled.context(random_prompt(256, 200, seed=3), greedy()))
    for _ in range(3):
        scheduled.iterate()
        assert scheduled.results[request_id] == []
    scheduled.run()
    assert all(output.tokens for output in scheduled.outputs(request_id))


def test_outputs_say_what_became_of_the_drafts(scheduled: Scheduled, eagle_engine: Engine) -> None:
    tokens = random_prompt(256, 20, seed=3)
    request_id = scheduled.add(scheduled.context(tokens, greedy()))
    metrics = []

    def look(iteration: int) -> None:
        if iteration:  # before the first there are those of another test
            metrics.append(scheduled.pipeline.batch_spec_decode_metrics())

    scheduled.run(look)
    look(1)
    result = eagle_engine.generate([Request(token_ids=tokens, sampling=greedy())]).results[0]
    outputs = scheduled.outputs(request_id)
    assert outputs[0].drafted == 0
    assert sum(output.drafted for output in outputs) == result.drafted > 0
    assert sum(output.accepted for output in outputs) == result.accepted > 0
    verified = [each for each in metrics if each is not None and each.num_verifications]
    assert sum(sum(each.accepted_per_position) for each in verified) == result.accepted
    assert {each.num_speculative_tokens for each in verified} == {8}


def test_a_cancelled_request_is_gone(scheduled: Scheduled) -> None:
    stays = scheduled.add(scheduled.context(random_prompt(256, 12, seed=3), greedy()))
    goes = scheduled.add(scheduled.context(random_prompt(256, 30, seed=3), greedy(400)))

    def cancel(iteration: int) -> None:
        if iteration == 5:
            scheduled.cancel(goes)
        if iteration == 6:
            assert set(scheduled.pipeline.model.batch.rows) == {stays}
            assert len(scheduled.pipeline._preempted) == 0

    scheduled.run(cancel)
    assert scheduled.results[goes][-1].result is None
    assert len(scheduled.answer(stays)) == 40
