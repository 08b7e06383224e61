"""On a GPU: steps that are enqueued ahead, recorded or not, answer what steps answer that wait."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
from prompts import random_prompt
from reference.target import TargetReference, assert_same_greedy
from runs import answers, greedy_requests

from unispec.engine import Engine
from unispec.pipelines.runtime.ahead import LookAhead
from unispec.pipelines.runtime.captured import Captured

NEW_TOKENS = 200
"""On two pages and more."""
LENGTHS = (5, 64, 100, 130)


@contextmanager
def enqueueing(engine: Engine, ahead: LookAhead | None) -> Iterator[None]:
    before = engine.pipeline.ahead
    engine.pipeline.ahead = ahead
    try:
        yield
    finally:
        engine.pipeline.ahead = before


@pytest.mark.parametrize("name", ["llama_eagle", "deepseek_mtp"])
def test_answers_do_not_depend_on_when_steps_are_enqueued(
    gpu_engine: Callable[[str], Engine], gpu_target: Callable[[str], TargetReference], name: str
) -> None:
    """Up to near-ties, for a step ahead reserves its reads for longer rows."""
    engine, target = gpu_engine(name), gpu_target(name)
    pipeline = engine.pipeline
    prompts = [random_prompt(engine.vocab_size, length, seed=length) for length in LENGTHS]
    requests = greedy_requests(prompts, NEW_TOKENS, ignore_eos=True)
    assert pipeline.ahead is not None
    with enqueueing(engine, None):
        waiting = answers(engine, requests)
    ahead = LookAhead(pipeline.model, pipeline.kv_manager)
    with enqueueing(engine, ahead):
        found = answers(engine, requests)
    assert ahead.num_taken > NEW_TOKENS / 10
    for prompt, answer, other in zip(prompts, found, waiting, strict=True):
        trace = target.greedy(prompt, NEW_TOKENS, set(), guess=answer)
        assert_same_greedy(answer, trace)
        if answer != other:
            assert_same_greedy(other, target.greedy(prompt, NEW_TOKENS, set(), guess=other))


def test_recorded_steps_answer_what_launched_ones_do(
    gpu_engine: Callable[[str], Engine],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """To the last token: a replay runs the same kernels on the same memory."""
    engine = gpu_engine("llama_eagle")
    pipeline = engine.pipeline
    replay = Captured.replay
    replays: list[Captured] = []
    monkeypatch.setattr(Captured, "replay", lambda one: (replays.append(one), replay(one))[1])
    prompts = [random_prompt(engine.vocab_size, length, seed=length) for length in LENGTHS]
    requests = greedy_requests(prompts, NEW_TOKENS, ignore_eos=True)
    found = []
    for captures in (False, True):
        with enqueueing(engine, LookAhead(pipeline.model, pipeline.kv_manager, captures=captures)):
            found.append(answers(engine, requests))
    assert found[0] == found[1]
    assert len(replays) > NEW_TOKENS / 10
    assert "cannot record" not in caplog.text
