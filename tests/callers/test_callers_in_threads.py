"""Callers in several threads share one engine: each gets its own answers and errors."""

from __future__ import annotations

import gc
import threading
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from calls import NEW_TOKENS, answers, finish, in_threads, request, tokens_of
from numpy_graph import NumpyGraph, continuation, numpy_engine
from tiny import TinyPair

from unispec.engine import Engine
from unispec.errors import InputError
from unispec.pipelines.architectures.unified_eagle_llama3 import UnifiedEagleLlama3Model


def test_threads_get_the_answers_they_get_alone(made: tuple[Engine, NumpyGraph]) -> None:
    """Six threads, many calls of one to six requests each, through four rows."""
    engine, graph = made
    graph.before = lambda last: time.sleep(0.0005)

    def calls(thread: int) -> None:
        random = np.random.default_rng(thread)
        for _ in range(4):
            prompts = [
                random.integers(3, 253, random.integers(1, 70)).tolist()
                for _ in range(random.integers(1, 7))
            ]
            lengths = random.integers(1, 30, len(prompts)).tolist()
            requests = [
                request(*prompt, new_tokens=length)
                for prompt, length in zip(prompts, lengths, strict=True)
            ]
            assert answers(engine, *requests) == [
                continuation(prompt[-1], length)
                for prompt, length in zip(prompts, lengths, strict=True)
            ]

    in_threads(*(lambda thread=thread: calls(thread) for thread in range(6)))
    assert max(graph.steps) == 4


def test_the_first_calls_of_two_threads_load_once(
    made: tuple[Engine, NumpyGraph], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, graph = made
    loaded: list[object] = []

    def load_slowly(model: Any, session: object) -> NumpyGraph:
        loaded.append(model)
        time.sleep(0.1)
        return graph

    monkeypatch.setattr(UnifiedEagleLlama3Model, "load_model", load_slowly)
    found = in_threads(*(lambda: answers(engine, request(5)) for _ in range(3)))
    assert found == [[continuation(5, NEW_TOKENS)]] * 3
    assert len(loaded) == 1


def test_a_load_that_fails_is_tried_again(
    made: tuple[Engine, NumpyGraph], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, _ = made

    def fail(model: object, session: object) -> None:
        raise InputError("a tensor is missing")

    with monkeypatch.context() as patch:
        patch.setattr(UnifiedEagleLlama3Model, "load_model", fail)
        with pytest.raises(InputError, match="a tensor is missing"):
            engine.generate([request(5)])
    assert answers(engine, request(5)) == [continuation(5, NEW_TOKENS)]


def test_text_comes_in_the_thread_of_its_caller(made: tuple[Engine, NumpyGraph]) -> None:
    engine, _ = made

    def call(token: int) -> tuple[set[int], list[int]]:
        threads: set[int] = set()
        finished: list[int] = []
        report = engine.generate(
            [request(token), request(token + 1)],
            on_text=lambda index, text: threads.add(threading.get_ident()),
            on_finish=lambda index: finished.append(index),
        )
        assert threads == {threading.get_ident()}
        assert sorted(finished) == [0, 1]
        return threads, list(report.results[0].token_ids)

    found = in_threads(lambda: call(5), lambda: call(100))
    assert [tokens for _, tokens in found] == [
        continuation(5, NEW_TOKENS),
        continuation(100, NEW_TOKENS),
    ]
    assert found[0][0] != found[1][0]


def test_a_call_from_a_callback(made: tuple[Engine, NumpyGraph]) -> None:
    """It joins the batch as any other."""
    engine, _ = made
    inner: list[list[int]] = []

    def on_text(index: int, text: str) -> None:
        if not inner:
            inner.extend(answers(engine, request(9)))

    assert answers(engine, request(5), on_text=on_text) == [continuation(5, NEW_TOKENS)]
    assert inner == [continuation(9, NEW_TOKENS)]


@pytest.mark.parametrize("callback", ["on_text", "on_finish"])
def test_an_error_in_a_callback_is_its_callers_alone(
    made: tuple[Engine, NumpyGraph], callback: str
) -> None:
    engine, graph = made
    graph.before = lambda last: time.sleep(0.001)

    def fail(*_: object) -> None:
        raise ZeroDivisionError

    def failing() -> None:
        with pytest.raises(ZeroDivisionError):
            engine.generate([request(5), request(6, new_tokens=200)], **{callback: fail})

    found = in_threads(failing, lambda: answers(engine, request(7, new_tokens=60)), failing)
    assert found == [None, [continuation(7, 60)], None]


def test_an_engine_that_is_dropped_ends_its_thread(
    tiny_pair: Callable[[str], TinyPair], monkeypatch: pytest.MonkeyPatch
) -> None:
    before = set(threading.enumerate())
    with numpy_engine(tiny_pair("llama_eagle"), monkeypatch) as (engine, _):
        engine.generate([request(5)])
        [thread] = set(threading.enumerate()) - before
    del engine
    gc.collect()
    thread.join(5)
    assert not thread.is_alive()


def test_a_step_that_fails_fails_its_rows(made: tuple[Engine, NumpyGraph]) -> None:
    """Those that wait for a row are answered, of this loop and of other callers."""
    engine, graph = made
    failed = [engine.add(request(5 + n)) for n in range(4)]
    waiting = engine.add(request(50))
    engine.step()

    def fail_once(last: list[int]) -> None:
        graph.before = lambda last: None
        raise RuntimeError("device lost")

    graph.before = fail_once
    lost = engine.step()
    assert [output.request_id for output in lost] == failed
    assert [str(output.error) for output in lost] == ["device lost"] * 4
    assert all(output.is_last and output.result is None for output in lost)
    assert engine.unfinished == 1
    assert answers(engine, request(60)) == [continuation(60, NEW_TOKENS)]
    assert tokens_of(finish(engine)[waiting]) == continuation(50, NEW_TOKENS)


def test_a_step_that_fails_is_raised_in_each_call_that_had_rows_in_it(
    made: tuple[Engine, NumpyGraph],
) -> None:
    engine, graph = made

    def fail(last: list[int]) -> None:
        time.sleep(0.001)
        if len(last) == 2:
            raise RuntimeError("device lost")

    def call(token: int) -> None:
        with pytest.raises(RuntimeError, match="device lost"):
            engine.generate([request(token, new_tokens=200)])

    graph.before = fail
    in_threads(lambda: call(5), lambda: call(6))
    graph.before = lambda last: None
    assert answers(engine, request(5)) == [continuation(5, NEW_TOKENS)]


def test_a_stop_text_ends_its_row_at_once(made: tuple[Engine, NumpyGraph]) -> None:
    """Even where the caller is busy with what came before."""
    engine, graph = made
    whole = engine.generate([request(5, new_tokens=40)]).results[0]
    stop = whole.text[4:7]
    graph.steps.clear()
    stopped = request(5, new_tokens=40, stop=[stop])
    report = engine.generate([stopped], on_text=lambda index, text: time.sleep(0.05))
    assert report.results[0].text == whole.text[: whole.text.index(stop)]
    assert report.results[0].finish_reason == "stop"
    assert len(graph.steps) < 10


def test_reports_of_calls_that_share_the_batch(made: tuple[Engine, NumpyGraph]) -> None:
    """Acceptance is that of the call's own drafts; steps are those that it took part in."""
    engine, graph = made
    alone = [engine.generate([request(token, new_tokens=60)]) for token in (5, 6)]
    assert alone[0].acceptance_per_position != alone[1].acceptance_per_position
    graph.before = lambda last: time.sleep(0.001)
    together = in_threads(
        *(lambda token=token: engine.generate([request(token, new_tokens=60)]) for token in (5, 6))
    )
    assert max(graph.steps) == 2
    for own, shared in zip(alone, together, strict=True):
        assert shared.results == own.results
        assert shared.acceptance_per_position == own.acceptance_per_position
        assert shared.mean_acceptance_length == own.mean_acceptance_length > 1
        # The other's prefill may make one of the steps no decode step.
        assert own.steps - 1 <= shared.steps == len(shared.decode_steps) <= own.steps
        assert 0.001 < shared.graph_time_s <= shared.step_time_s
        assert shared.time_to_first_token_s > 0
