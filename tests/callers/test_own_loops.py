"""A caller's own loop of `add` and `step`, and requests that are aborted."""

from __future__ import annotations

import threading
import time

import pytest
from calls import NEW_TOKENS, answers, finish, in_threads, request, tokens_of
from numpy_graph import NumpyGraph, continuation

from unispec.engine import Engine


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
