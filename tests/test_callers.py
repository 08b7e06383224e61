"""Several callers of one engine: their requests share a batch, and nothing else."""

from __future__ import annotations

import _thread
import gc
import random
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from linecache import getline
from types import FrameType
from typing import Any

import numpy as np
import pytest
from max.pipelines.context import SamplingParams
from numpy_graph import NumpyGraph, continuation, numpy_engine
from runs import assert_left_empty
from tiny import TinyPair

from unispec.engine import Engine, Output, Request
from unispec.engine import answer as answer_module
from unispec.engine import engine as engine_module
from unispec.engine import running as running_module
from unispec.errors import InputError
from unispec.pipelines.architectures.unified_eagle_llama3 import UnifiedEagleLlama3Model

NEW_TOKENS = 12


@pytest.fixture
def made(
    tiny_pair: Callable[[str], TinyPair], monkeypatch: pytest.MonkeyPatch
) -> Iterator[tuple[Engine, NumpyGraph]]:
    """An engine of up to 4 rows, and its graph; every test leaves it empty."""
    with numpy_engine(tiny_pair("llama_eagle"), monkeypatch) as both:
        yield both


def request(*tokens: int, new_tokens: int = NEW_TOKENS, **options: Any) -> Request:
    sampling = SamplingParams(temperature=0, max_new_tokens=new_tokens, **options)
    return Request(token_ids=tokens, sampling=sampling)


def answers(engine: Engine, *requests: Request, **callbacks: Any) -> list[list[int]]:
    return [list(result.token_ids) for result in engine.generate(requests, **callbacks).results]


def in_threads(*works: Callable[[], Any]) -> list[Any]:
    """What each returns; all begin at the same time."""
    together = threading.Barrier(len(works))

    def begin(work: Callable[[], Any]) -> Any:
        together.wait()
        return work()

    with ThreadPoolExecutor(len(works)) as pool:
        return list(pool.map(begin, works))


def finish(engine: Engine) -> dict[Any, list[Output]]:
    """Steps to the end; the outputs of each request."""
    outputs: dict[Any, list[Output]] = {}
    while engine.unfinished:
        for output in engine.step():
            outputs.setdefault(output.request_id, []).append(output)
    return outputs


def tokens_of(outputs: list[Output]) -> list[int]:
    return [token for output in outputs for token in output.token_ids]


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


def test_a_loop_of_ones_own(made: tuple[Engine, NumpyGraph]) -> None:
    """Requests join between two steps; outputs add up to the answers."""
    engine, graph = made
    assert engine.step() == []
    first = engine.add(request(5))
    assert engine.unfinished == 1
    begun = engine.step()
    second = engine.add(request(6, 7, new_tokens=5))
    outputs = finish(engine)
    outputs[first] = begun + outputs[first]
    assert tokens_of(outputs[first]) == continuation(5, NEW_TOKENS)
    assert tokens_of(outputs[second]) == continuation(7, 5)
    assert graph.steps[:2] == [1, 2]
    for request_id in (first, second):
        *early, last = outputs[request_id]
        assert not any(output.is_last for output in early)
        assert last.result is not None
        assert last.result.token_ids == tokens_of(outputs[request_id])
        assert last.result.text == "".join(output.text for output in outputs[request_id])
        assert last.result.finish_reason == "length"
    assert engine.step() == []


def test_steps_are_run_only_when_asked_for(made: tuple[Engine, NumpyGraph]) -> None:
    engine, graph = made
    engine.add(request(5))
    time.sleep(0.02)
    assert graph.steps == []
    engine.step()
    time.sleep(0.02)
    assert graph.steps == [1]
    finish(engine)


def test_a_step_of_a_long_prompt_brings_nothing(made: tuple[Engine, NumpyGraph]) -> None:
    engine, graph = made
    added = engine.add(request(*range(3, 73)))
    assert [engine.step(), engine.step()] == [[], []]
    assert tokens_of(finish(engine)[added]) == continuation(72, NEW_TOKENS)
    assert graph.steps[:3] == [1, 1, 1]


def test_generate_beside_a_loop_of_ones_own(made: tuple[Engine, NumpyGraph]) -> None:
    """Each gets its own outputs, whoever wanted the steps."""
    engine, graph = made
    added = engine.add(request(5))
    assert answers(engine, request(6)) == [continuation(6, NEW_TOKENS)]
    assert graph.steps[0] == 2
    assert engine.unfinished == 1
    assert tokens_of(finish(engine)[added]) == continuation(5, NEW_TOKENS)


@pytest.mark.parametrize("steps", [0, 1, 2, 4])
def test_aborting(made: tuple[Engine, NumpyGraph], steps: int) -> None:
    """Before its first step, in its prompt, and while it is answered; nothing follows of it."""
    engine, _ = made
    gone = engine.add(request(*range(3, 60), new_tokens=50))
    for _ in range(steps):
        engine.step()
    stays = engine.add(request(5))
    engine.abort(gone)
    assert engine.unfinished == 1
    outputs = finish(engine)
    assert outputs.keys() == {stays}
    assert tokens_of(outputs[stays]) == continuation(5, NEW_TOKENS)
    engine.abort(gone)
    engine.abort(stays)


def test_aborting_a_request_that_waits_for_a_row(made: tuple[Engine, NumpyGraph]) -> None:
    engine, _ = made
    added = [engine.add(request(5 + n)) for n in range(6)]
    begun = engine.step()
    assert [output.request_id for output in begun] == added[:4]
    engine.abort(added[5])
    outputs = finish(engine)
    assert outputs.keys() == {*added[:5]}
    assert tokens_of(outputs[added[4]]) == continuation(9, NEW_TOKENS)


def test_aborting_what_is_answered_already(made: tuple[Engine, NumpyGraph]) -> None:
    """Its outputs, which nobody took, are dropped."""
    engine, _ = made
    gone = engine.add(request(5, new_tokens=2))
    engine.generate([request(6)])
    engine.abort(gone)
    assert (engine.unfinished, engine.step()) == (0, [])


def test_aborting_in_the_middle_of_a_step(made: tuple[Engine, NumpyGraph]) -> None:
    """Another thread's step goes on for the rest of its rows."""
    engine, graph = made
    gone, stays = engine.add(request(5)), engine.add(request(6))
    inside = threading.Event()

    def in_step(last: list[int]) -> None:
        inside.set()
        time.sleep(0.02)

    def abort() -> None:
        inside.wait()
        engine.abort(gone)

    graph.before = in_step
    outputs, _ = in_threads(engine.step, abort)
    rest = finish(engine)
    assert {output.request_id for output in outputs} == {stays}
    assert tokens_of(outputs + rest[stays]) == continuation(6, NEW_TOKENS)


def test_a_step_whose_last_request_is_aborted_while_it_is_waited_for(
    made: tuple[Engine, NumpyGraph],
) -> None:
    """A caller of `step` does not wait for ever."""
    engine, graph = made
    inside, aborting = threading.Event(), threading.Event()

    def in_step(last: list[int]) -> None:
        inside.set()
        aborting.wait()
        time.sleep(0.02)

    gone = engine.add(request(5))
    graph.before = in_step

    def abort() -> None:
        inside.wait()
        aborting.set()
        engine.abort(gone)

    found = in_threads(engine.step, engine.step, abort)
    assert found == [[], [], None]


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


def test_ctrl_c_takes_out_the_call_of_the_main_thread_alone(
    made: tuple[Engine, NumpyGraph],
) -> None:
    """Wherever the step is; the other caller's answer goes on to its end."""
    engine, graph = made
    for at in (1, 2, 5):
        interrupted = threading.Event()

        def before(last: list[int], at: int = at, done: threading.Event = interrupted) -> None:
            time.sleep(0.002)
            if len(last) == 2 and not done.is_set() and graph.steps.count(2) >= at:
                done.set()
                _thread.interrupt_main()
                time.sleep(0.01)

        graph.steps.clear()
        graph.before = before
        with ThreadPoolExecutor(1) as pool:
            other = pool.submit(answers, engine, request(7, new_tokens=60))
            with pytest.raises(KeyboardInterrupt):
                engine.generate([request(5, new_tokens=150)])
            assert engine.num_requests <= 1
            assert other.result() == [continuation(7, 60)]
        assert_left_empty(engine)


def test_an_interrupt_at_any_line_leaves_nothing_behind(made: tuple[Engine, NumpyGraph]) -> None:
    """Of a call of five requests, one of which waits for a row."""
    engine, _ = made
    engine.generate([request(9)])
    files = {module.__file__ for module in (engine_module, running_module, answer_module)}
    ran = 0

    def interrupt(at: int) -> Any:
        left = at

        def trace(frame: FrameType, event: str, argument: object) -> Any:
            nonlocal left
            if frame.f_code.co_filename not in files:
                return None
            # The line of a lock is traced on the way out too, where Python takes no signal.
            line = getline(frame.f_code.co_filename, frame.f_lineno).strip()
            if event == "line" and not line.startswith("with "):
                left -= 1
                if left == 0:
                    raise KeyboardInterrupt
            return trace

        return trace

    for at in range(1, 1000):
        requests = [request(5 + n, new_tokens=4) for n in range(5)]
        before = sys.gettrace()
        sys.settrace(interrupt(at))
        try:
            engine.generate(requests)
            break
        except KeyboardInterrupt:
            ran = at
        finally:
            sys.settrace(before)
        assert_left_empty(engine)
    assert ran > 100
    assert answers(engine, *requests) == [continuation(5 + n, 4) for n in range(5)]


def interrupted(work: Callable[[], Any], after: float) -> bool:
    """Whether a signal, so many seconds after the beginning of some work, came before its end."""
    inside = True

    def interrupt(number: int, frame: object) -> None:
        nonlocal inside
        if inside:
            inside = False
            raise KeyboardInterrupt

    before = signal.signal(signal.SIGALRM, interrupt)
    try:
        signal.setitimer(signal.ITIMER_REAL, after)
        work()
        inside = False
    except KeyboardInterrupt:
        return True
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    return False


@pytest.mark.parametrize("own_loop", [False, True], ids=["generate", "own-loop"])
def test_signals_at_any_time(made: tuple[Engine, NumpyGraph], own_loop: bool) -> None:
    """Hundreds of them; another thread's answers stay right, and nothing is left behind."""
    engine, graph = made
    engine.generate([request(9)])
    over = threading.Event()
    draw = random.Random(5)
    usual = sys.getswitchinterval()

    def before(last: list[int]) -> None:
        # About when callers wake up.
        if draw.random() < 0.3 and signal.getitimer(signal.ITIMER_REAL)[0]:
            signal.setitimer(signal.ITIMER_REAL, draw.uniform(1e-6, 1e-3))

    def calls() -> int:
        count = 0
        while not over.is_set():
            assert answers(engine, request(7, new_tokens=20)) == [continuation(7, 20)]
            count += 1
        return count

    def alone() -> None:
        if own_loop:
            engine.add(request(5, new_tokens=4))
            engine.step()
            engine.abort(engine.add(request(6)))
        else:
            engine.generate([request(5 + n, new_tokens=4) for n in range(5)])

    graph.before = before
    sys.setswitchinterval(1e-6)
    with ThreadPoolExecutor(1) as pool:
        other = pool.submit(calls)
        try:
            count = sum(interrupted(alone, 10 ** draw.uniform(-5, -2)) for _ in range(400))
        finally:
            over.set()
            sys.setswitchinterval(usual)
        assert other.result(timeout=30) > 0
    assert count > 100
    finish(engine)
    assert_left_empty(engine)
    assert answers(engine, request(5)) == [continuation(5, NEW_TOKENS)]


def test_an_interrupted_step_loses_no_output(made: tuple[Engine, NumpyGraph]) -> None:
    """What the step brings waits for the next call."""
    engine, graph = made
    added = engine.add(request(5))
    graph.before = lambda last: time.sleep(0.05)
    assert interrupted(engine.step, 0.02)
    graph.before = lambda last: None
    assert tokens_of(finish(engine)[added]) == continuation(5, NEW_TOKENS)


@pytest.mark.parametrize("owner", ["scheduler", "pipeline", "manager"])
def test_a_request_that_cannot_be_freed_at_once(
    made: tuple[Engine, NumpyGraph], owner: str
) -> None:
    """Whoever fails in it, its call fails and the engine goes on."""
    engine, _ = made
    pipeline = engine.pipeline
    of, name = {
        "scheduler": (engine.scheduler, "finish"),
        "pipeline": (pipeline, "release"),
        "manager": (pipeline.kv_manager, "release"),
    }[owner]

    def fail_once() -> None:
        patch = pytest.MonkeyPatch()

        def fail(*_: object) -> None:
            patch.undo()
            raise RuntimeError("a page is lost")

        patch.setattr(of, name, fail)

    fail_once()
    with pytest.raises(RuntimeError, match="a page is lost"):
        engine.generate([request(5)])
    assert_left_empty(engine)
    assert answers(engine, request(5)) == [continuation(5, NEW_TOKENS)]
    gone, stays = engine.add(request(6)), engine.add(request(7))
    engine.step()
    fail_once()
    engine.abort(gone)
    [lost] = engine.step()
    assert (lost.request_id, str(lost.error)) == (stays, "a page is lost")
    assert_left_empty(engine)
    assert answers(engine, request(5)) == [continuation(5, NEW_TOKENS)]


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
