"""Requests that join and leave a running batch: each is answered as if it were alone."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from threading import Barrier
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from max.driver import Buffer
from max.pipelines.context import SamplingParams, TextContext, TokenBuffer
from max.pipelines.modeling.types import TextGenerationInputs
from runs import observing, proposing

from unispec.engine import Engine, Request, Result
from unispec.engine.scheduler import Scheduler
from unispec.errors import InputError

VOCABULARY = 256
PAGES = 7
"""Of a small cache: a few rows at a time."""

KINDS: tuple[dict[str, Any], ...] = (
    {"temperature": 0},
    {"temperature": 0, "repetition_penalty": 1.3},
    {"temperature": 1.0},
    {"temperature": 1.5, "top_k": 20, "top_p": 0.9},
    {"temperature": 0.7, "min_p": 0.05, "frequency_penalty": 0.5},
)


def make_request(length: int, new_tokens: int, kind: int, seed: int) -> Request:
    tokens = np.random.default_rng(seed).integers(3, VOCABULARY, length).tolist()
    sampling = SamplingParams(
        max_new_tokens=new_tokens, seed=seed, ignore_eos=kind == 0, **KINDS[kind]
    )
    return Request(token_ids=tokens, sampling=sampling)


requests_ = st.builds(
    make_request,
    length=st.one_of(st.integers(1, 12), st.integers(50, 140), st.integers(240, 300)),
    new_tokens=st.integers(1, 40),
    kind=st.integers(0, len(KINDS) - 1),
    seed=st.integers(0, 2**64 - 1),
)


@settings(
    max_examples=10,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(requests=st.lists(requests_, min_size=20, max_size=20))
def test_every_answer_equals_its_solo_answer(engine: Engine, requests: list[Request]) -> None:
    """200 requests in all, through a cache that holds a part of them at a time."""
    alone = [engine.generate([request]).results[0] for request in requests]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine.scheduler, "num_pages", PAGES)
        together = engine.generate(requests).results
    assert [result.token_ids for result in together] == [result.token_ids for result in alone]
    assert [result.text for result in together] == [result.text for result in alone]
    assert [result.finish_reason for result in together] == [r.finish_reason for r in alone]


def test_threads_get_the_answers_they_get_alone(eagle_engine: Engine) -> None:
    """Six threads call one engine at the same time; see tests/callers for all else."""
    random = np.random.default_rng(4)
    calls = [
        [
            make_request(int(length), 24, int(kind), seed=10 * thread + call)
            for call, (length, kind) in enumerate(
                zip(random.integers(1, 140, 4), random.integers(0, len(KINDS), 4), strict=True)
            )
        ]
        for thread in range(6)
    ]
    alone = [
        [eagle_engine.generate([request]).results[0] for request in requests] for requests in calls
    ]
    rows: list[int] = []
    begin = Barrier(len(calls))

    def call(requests: list[Request]) -> list[Result]:
        begin.wait()
        first = eagle_engine.generate(requests[:1]).results
        return first + eagle_engine.generate(requests[1:]).results

    def answer(result: Result) -> tuple[list[int], str, str]:
        return result.token_ids, result.text, result.finish_reason

    with (
        observing(eagle_engine, lambda step: rows.append(len(step.rows))),
        ThreadPoolExecutor(len(calls)) as pool,
    ):
        together = list(pool.map(call, calls))
    for results, expected in zip(together, alone, strict=True):
        assert [answer(result) for result in results] == [answer(result) for result in expected]
    assert max(rows) > 3


def test_a_request_that_can_never_fit(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is refused before anything runs, and the next call is answered as ever."""
    fits = make_request(10, 10, 0, 1)
    expected = engine.generate([fits]).results[0].token_ids
    monkeypatch.setattr(engine, "num_pages", 2)
    with pytest.raises(InputError, match=r"2.*lower max_new_tokens"):
        engine.generate([fits, make_request(300, 40, 0, 2)])
    assert engine.generate([fits]).results[0].token_ids == expected


def test_release_in_mid_flight(engine: Engine) -> None:
    """A row that leaves between two steps changes nothing for the others."""
    pipeline = engine.pipeline
    requests = [make_request(length, 24, 0, length) for length in (5, 70, 9)]
    expected = [engine.generate([request]).results[0].token_ids for request in requests]
    scheduler = Scheduler(
        pipeline.kv_manager,
        num_pages=engine.num_pages,
        max_batch_size=8,
        max_batch_input_tokens=64,
    )
    contexts = [
        TextContext(
            max_length=len(request.token_ids) + 24,
            tokens=TokenBuffer(np.array(request.token_ids, np.int64)),
            sampling_params=request.sampling,
        )
        for request in requests
    ]
    answers: dict[int, list[int]] = {0: [], 1: [], 2: []}
    for context in contexts:
        scheduler.add(context)
    leaving = contexts[0]
    for _ in range(100):
        batch = scheduler.next_batch()
        if not batch:
            break
        outputs = pipeline.execute(TextGenerationInputs(batches=[batch]))
        for context in batch:
            index = next(at for at, other in enumerate(contexts) if other is context)
            answers[index] += outputs[context.request_id].tokens
            if context.is_done or (context is leaving and len(answers[0]) > 4):
                scheduler.finish(context)
                pipeline.release(context.request_id)
    assert 4 < len(answers[0]) < 24
    assert answers[0] == expected[0][: len(answers[0])]
    assert [answers[1], answers[2]] == expected[1:]


def test_an_error_in_the_middle(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """No page and no row stays behind, and the engine goes on; the fixture counts pages."""
    requests = [make_request(length, 20, 0, length) for length in (5, 70)]
    expected = engine.generate(requests).results
    model = engine.pipeline.model
    execute, calls = model.execute, []

    def fail_once(inputs: Any) -> Any:
        calls.append(inputs)
        if len(calls) == 3:
            raise RuntimeError("device lost")
        return execute(inputs)

    with monkeypatch.context() as patch:
        patch.setattr(model, "execute", fail_once)
        with pytest.raises(RuntimeError, match="device lost"):
            engine.generate(requests)
    assert engine.num_requests == 0
    assert engine.generate(requests).results == expected


def test_a_warm_prefix_is_not_prefilled_again(engine: Engine) -> None:
    """Pages of 128 tokens that match are taken from the cache, and the answer is the same."""
    manager = engine.pipeline.kv_manager
    prompt = make_request(300, 12, 0, 7)
    branch = Request(
        token_ids=[*prompt.token_ids[:256], *make_request(20, 1, 0, 8).token_ids],
        sampling=prompt.sampling,
    )
    cold = engine.generate([prompt]).results[0]
    engine.reset_prefix_cache()
    cold_branch = engine.generate([branch]).results[0]
    engine.reset_prefix_cache()
    engine.generate([prompt])
    before = manager.get_metrics_aggregated().cache_tokens
    warm = engine.generate([prompt]).results[0]
    reused = manager.get_metrics_aggregated().cache_tokens - before
    warm_branch = engine.generate([branch]).results[0]
    reused_by_branch = manager.get_metrics_aggregated().cache_tokens - before - reused
    # An EAGLE draft's entries for the second page depend on the token after it, which differs.
    assert reused == 256
    method = engine.pipeline.pipeline_config.speculative.speculative_method
    assert reused_by_branch == {"eagle": 128, "dflash": 256}[method]
    assert warm == cold
    assert warm_branch == cold_branch


def test_metrics_count_what_happened(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """Drafted, accepted and the share per position, against counting by hand."""
    model = engine.pipeline.model
    execute, accepted = model.execute, []

    def recording(inputs: Any) -> Any:
        outputs = execute(inputs)
        if inputs.draft_tokens.shape[1]:
            accepted.append(int(outputs.num_accepted_draft_tokens.to_numpy()[0]))
        return outputs

    monkeypatch.setattr(model, "execute", recording)
    report = engine.generate([make_request(9, 40, 0, 3)])
    steps = len(accepted)
    assert report.results[0].drafted == 5 * steps
    assert report.results[0].accepted == sum(accepted)
    assert report.mean_acceptance_length == pytest.approx(1 + sum(accepted) / steps)
    shares = [sum(count > place for count in accepted) / steps for place in range(5)]
    assert report.acceptance_per_position == pytest.approx(shares)
    assert report.steps == steps


@pytest.mark.parametrize("k", [1, 3, 5])
def test_stop_strings_end_the_text_exactly(engine: Engine, k: int) -> None:
    """Wherever the string falls, in an accepted run or across two, the text ends before it."""
    with proposing(engine, k):
        request = make_request(9, 40, 0, 5)
        whole = engine.generate([request]).results[0]
        for start in range(0, len(whole.text) - 3, 4):
            stop = whole.text[start : start + 3]
            params = SamplingParams(
                max_new_tokens=40, temperature=0, ignore_eos=True, stop=[stop], seed=5
            )
            pieces: list[str] = []
            result = engine.generate(
                [Request(token_ids=request.token_ids, sampling=params)],
                on_text=lambda _, text, pieces=pieces: pieces.append(text),
            ).results[0]
            assert result.text == whole.text[: whole.text.index(stop)]
            assert "".join(pieces) == result.text
            assert result.finish_reason == "stop"
            assert result.token_ids == whole.token_ids[: len(result.token_ids)]


def test_the_next_inputs_of_a_plain_decode_step(engine: Engine) -> None:
    """`prepare_next_token_inputs` continues a prefill as the pipeline itself would."""
    model, manager = engine.pipeline.model, engine.pipeline.kv_manager
    request = make_request(20, 8, 0, 9)
    expected = engine.generate([request]).results[0].token_ids
    context = TextContext(
        max_length=40,
        tokens=TokenBuffer(np.array(request.token_ids, np.int64)),
        sampling_params=request.sampling,
    )
    manager.reset_prefix_cache()
    manager.claim(context)
    manager.alloc(context)
    inputs = model.prepare_initial_token_inputs([[context]], manager.runtime_inputs([[context]]))
    answer = []
    for _ in range(4):
        outputs = model.execute(inputs)
        answer.append(int(outputs.next_tokens.to_numpy()[0]))
        context.update(answer[-1])
        manager.alloc(context)
        inputs = model.prepare_next_token_inputs(outputs.next_tokens, inputs)
        inputs.kv_cache_inputs = manager.runtime_inputs([[context]])
    manager.release(context)
    engine.pipeline.release(context.request_id)
    assert answer == expected[:4]


def test_what_the_draft_did_not_read_needs_inputs_made_of_the_requests(
    eagle_engine: Engine,
) -> None:
    model, one = eagle_engine.pipeline.model, Buffer.from_numpy(np.array([7]))
    void = np.full((1, 2), -1)
    assert model.batch.deferred is not None
    nothing = model.batch.nothing_deferred([3])
    inputs = model.inputs_cls(
        tokens=one,
        input_row_offsets=Buffer.from_numpy(np.array([0, 1], np.uint32)),
        return_n_logits=Buffer.from_numpy(np.array([3])),
        draft_tokens=Buffer.from_numpy(void),
        num_speculative_tokens=Buffer.from_numpy(np.array(0)),
        **nothing,
    )
    assert model.prepare_next_token_inputs(one, inputs).tokens is one
    inputs.num_logged = Buffer.from_numpy(np.array(1))
    with pytest.raises(InputError, match=r"did not read.*prepare_initial_token_inputs"):
        model.prepare_next_token_inputs(one, inputs)


def test_calculate_max_seq_len(engine: Engine) -> None:
    config = engine.pipeline.pipeline_config
    limit = config.model.huggingface_config
    assert engine.pipeline.model.calculate_max_seq_len(config, limit) == 512


def test_a_warm_prefix_is_drafted_for_as_well(engine: Engine) -> None:
    """What the cache holds of the draft is as good as what a prefill writes."""
    requests = [make_request(length, 60, 0, length) for length in (129, 200, 257, 300)]
    cold = engine.generate(requests)
    before = engine.pipeline.kv_manager.get_metrics_aggregated().cache_tokens
    warm = engine.generate(requests)
    assert engine.pipeline.kv_manager.get_metrics_aggregated().cache_tokens > before
    assert [r.token_ids for r in warm.results] == [r.token_ids for r in cold.results]
    assert warm.mean_acceptance_length == pytest.approx(cold.mean_acceptance_length, rel=0.01)
    assert cold.mean_acceptance_length > 1.5
