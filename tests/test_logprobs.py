"""Log probabilities are the target's own, whatever is sampled, drafted, cached or batched."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from max.pipelines.context import SamplingParams, TextContext, TokenBuffer
from max.pipelines.modeling.types import TextGenerationInputs
from prompts import random_prompt, real_prompts
from reference.logprobs import assert_logprobs
from reference.target import TargetReference
from runs import assert_left_empty, proposing

from unispec.engine import Engine, Request, Result, TokenLogprobs
from unispec.engine.scheduler import Scheduler
from unispec.errors import InputError
from unispec.sampling.grammar import Grammar

VOCAB = 256
NAMES = pytest.mark.parametrize(
    "name", ["llama_eagle_agreeing", "llama_dflash_agreeing", "deepseek_mtp_agreeing"]
)

KINDS: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0},
    "sampled": {"temperature": 1.0, "top_k": 30, "top_p": 0.9, "min_p": 0.01},
    "penalised": {"temperature": 0, "repetition_penalty": 1.5, "frequency_penalty": 0.5},
    "long": {"temperature": 0, "min_new_tokens": 30},
}
COUNTS = (20, None, 0, 5, None, 1, 7)


def request(
    length: int, *, new_tokens: int = 30, logprobs: int | None = None, **options: Any
) -> Request:
    sampling = SamplingParams(max_new_tokens=new_tokens, seed=length, **options)
    return Request(
        token_ids=random_prompt(VOCAB, length, seed=3), sampling=sampling, logprobs=logprobs
    )


def mixed() -> list[Request]:
    """A batch of all kinds, some prompts longer than a chunk of 64 tokens; nobody asks."""
    made = [request(9 + 40 * at, **options) for at, options in enumerate(KINDS.values())]
    date = Grammar("regex", "[0-9]{4}-[0-9]{2}-[0-9]{2}")
    return [
        *made,
        replace(request(6, temperature=0), logit_bias={40: 9.0, 50: -100.0}),
        replace(request(7, temperature=1.5), grammar=date),
        request(150, temperature=0.8, presence_penalty=1.0),
    ]


def asking(requests: list[Request], shift: int = 0) -> list[Request]:
    """The same requests, most of which ask."""
    counts = COUNTS[shift:] + COUNTS[:shift]
    return [replace(one, logprobs=count) for one, count in zip(requests, counts, strict=True)]


def tokens(results: list[Result]) -> list[list[int]]:
    return [result.token_ids for result in results]


def assert_right(requests: list[Request], results: list[Result], target: TargetReference) -> None:
    for one, result in zip(requests, results, strict=True):
        if one.logprobs is None:
            assert result.logprobs == []
        else:
            assert_logprobs(result, target, one.token_ids, count=one.logprobs)


@NAMES
@pytest.mark.parametrize("k", [1, 3])
@pytest.mark.usefixtures("one_thread")
def test_values_in_a_mixed_batch(
    name: str,
    k: int,
    tiny_engine: Callable[[str], Engine],
    tiny_target: Callable[[str], TargetReference],
) -> None:
    """Drafts are accepted and refused, and the answers are those of a batch that does not ask."""
    engine = tiny_engine(name)
    engine.reset_prefix_cache()
    with proposing(engine, k):
        plain = engine.generate(mixed()).results
        for shift in (0, 1):  # the second time from cached prompts
            requests = asking(mixed(), shift)
            results = engine.generate(requests).results
            assert tokens(results) == tokens(plain)
            assert_right(requests, results, tiny_target(name))
    drafted = sum(result.drafted for result in results)
    assert 0 < sum(result.accepted for result in results) < drafted
    assert_left_empty(engine)


@pytest.mark.usefixtures("one_thread")
def test_values_of_a_target_alone(
    target_only_engine: Engine, tiny_target: Callable[[str], TargetReference]
) -> None:
    requests = asking(mixed())
    results = target_only_engine.generate(requests).results
    assert tokens(results) == tokens(target_only_engine.generate(mixed()).results)
    assert_right(requests, results, tiny_target("llama_eagle_agreeing"))


def test_outputs_of_steps_make_up_the_result(eagle_engine: Engine) -> None:
    request_id = eagle_engine.add(request(12, temperature=0, logprobs=3))
    silent = eagle_engine.add(request(12, temperature=0))
    logprobs: list[TokenLogprobs] = []
    while eagle_engine.unfinished:
        for output in eagle_engine.step():
            if output.request_id == silent:
                assert not output.logprobs
                continue
            assert output.request_id == request_id
            assert len(output.logprobs) == len(output.token_ids)
            logprobs += output.logprobs
            if output.result is not None:
                result = output.result
    assert result.logprobs == logprobs
    assert len(logprobs) == len(result.token_ids)


def test_an_answer_that_a_stop_text_ends(eagle_engine: Engine) -> None:
    """Tokens that a step brought behind it are none of the answer."""
    whole = eagle_engine.generate([request(12, temperature=0, logprobs=2)]).results[0]
    for at in range(3, 12):
        stop = whole.text[at : at + 2]
        one = request(12, temperature=0, logprobs=2, stop=[stop])
        [result] = eagle_engine.generate([one]).results
        assert result.finish_reason == "stop"
        count = len(result.token_ids)
        assert len(result.logprobs) == count < len(whole.token_ids)
        for ours, theirs in zip(result.logprobs, whole.logprobs, strict=False):
            assert ours.logprob == pytest.approx(theirs.logprob, abs=1e-4)


def context(prompt: list[int], count: int) -> TextContext:
    """A request as MAX's server makes it of `logprobs` or `top_logprobs`."""
    return TextContext(
        max_length=len(prompt) + 16,
        tokens=TokenBuffer(np.array(prompt, np.int64)),
        sampling_params=SamplingParams(temperature=1.5, seed=2),
        log_probabilities=count,
    )


@pytest.mark.usefixtures("one_thread")
def test_what_max_server_reads_from_a_context(
    eagle_engine: Engine, tiny_target: Callable[[str], TargetReference]
) -> None:
    """One entry a token; the token itself is always among the most probable ones."""
    pipeline = eagle_engine.pipeline
    scheduler = Scheduler(
        pipeline.kv_manager,
        num_pages=eagle_engine.num_pages,
        max_batch_size=8,
        max_batch_input_tokens=64,
    )
    counts = (0, 1, 7)
    prompts = [random_prompt(VOCAB, length, seed=4) for length in (5, 80, 9)]
    contexts = [context(*made) for made in zip(prompts, counts, strict=True)]
    for one in contexts:
        scheduler.add(one)
    answers: dict[Any, Result] = {one.request_id: Result() for one in contexts}
    while batch := scheduler.next_batch():
        outputs = pipeline.execute(TextGenerationInputs(batches=[batch]))
        for one in batch:
            output, answer = outputs[one.request_id], answers[one.request_id]
            answer.token_ids += output.tokens
            entries = output.log_probabilities
            if not one.log_probabilities:
                assert entries is None
                continue
            assert entries is not None  # a list for a chunk of the prompt, too
            for token, entry in zip(output.tokens, entries, strict=True):
                assert entry.sampled_token_ids == [token]
                (own,), (top,) = entry.token_log_probabilities, entry.top_log_probabilities
                assert top[token] == own
                best = dict(list(top.items())[: one.log_probabilities])
                assert set(top) == set(best) | {token}
                answer.logprobs.append(TokenLogprobs(logprob=own, top=best))
        for one in batch:
            if one.is_done:
                scheduler.finish(one)
                pipeline.release(one.request_id)
    target = tiny_target("llama_eagle_agreeing")
    for prompt, count, answer in zip(prompts, counts, answers.values(), strict=True):
        if count:
            assert_logprobs(answer, target, prompt, count=count)


def test_a_context_that_asks_for_too_many_is_refused(eagle_engine: Engine) -> None:
    one = context([5, 6], 21)
    with pytest.raises(InputError, match="logprobs is 21; give an integer, 0 to 20, or None"):
        eagle_engine.pipeline.model.batch.row(one)


def test_values_of_a_large_vocabulary(demo_engine: Engine, demo_target: TargetReference) -> None:
    """SmolLM2 has 49,152 tokens."""
    prompts = real_prompts(demo_engine.tokenizer)[7:11]
    sampling = SamplingParams(temperature=0.7, seed=1, max_new_tokens=24)
    requests = [Request(token_ids=ids, sampling=sampling, logprobs=20) for ids in prompts]
    for one, result in zip(requests, demo_engine.generate(requests).results, strict=True):
        assert_logprobs(result, demo_target, one.token_ids, count=20)
