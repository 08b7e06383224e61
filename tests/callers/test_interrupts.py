"""An interrupt takes out the call of the main thread alone, and leaves nothing behind."""

from __future__ import annotations

import _thread
import random
import signal
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from linecache import getline
from types import FrameType
from typing import Any

import pytest
from calls import NEW_TOKENS, answers, finish, request, tokens_of
from numpy_graph import NumpyGraph, continuation
from runs import assert_left_empty

from unispec.engine import Engine
from unispec.engine import answer as answer_module
from unispec.engine import engine as engine_module
from unispec.engine import running as running_module


def test_ctrl_c_takes_out_the_call_of_the_main_thread_alone(
    made: tuple[Engine, NumpyGraph],
) -> None:
    """Wherever the step is; the other caller's answer goes on to its end."""
    engine, graph = made
    for at in (1, 2, 5):
        interrupted = threading.Event()

        def before(last: list[int], at: int = at, done: threading.Event = interrupted) -> None:
            # Slow as long as the other caller is alone, so that both meet.
            time.sleep(0.002 if len(last) == 2 or done.is_set() else 0.05)
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
