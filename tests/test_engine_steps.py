"""What a program sets between two steps, and what it is told of each step."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
from max.pipelines.context import SamplingParams
from numpy_graph import continuation, numpy_engine
from runs import assert_left_empty, observing, proposing
from tiny import TinyPair

from unispec.engine import Engine, EngineConfig, Request, Step
from unispec.errors import InputError

K = 3
"""What the engine is loaded for."""


@pytest.fixture
def engine(
    tiny_pair: Callable[[str], TinyPair], monkeypatch: pytest.MonkeyPatch
) -> Iterator[Engine]:
    """An engine of up to 4 rows and 32 tokens a step; every test leaves it empty."""
    with numpy_engine(tiny_pair("llama_eagle"), monkeypatch) as (made, _):
        yield made


def request(*tokens: int, new_tokens: int = 12) -> Request:
    sampling = SamplingParams(temperature=0, max_new_tokens=new_tokens)
    return Request(token_ids=tokens, sampling=sampling)


def proposed(engine: Engine, *requests: Request, **callbacks: Any) -> list[int]:
    """How many tokens each step proposed for each request that goes on."""
    counts: list[int] = []

    def count(step: Step) -> None:
        counts.extend(len(one.row.drafts) for one in step.rows if not one.context.is_done)

    with observing(engine, count):
        engine.generate(requests, **callbacks)
    return counts


def test_k_is_set_before_loading_and_between_calls(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert (engine.num_speculative_tokens, engine.max_speculative_tokens) == (K, K)
    with monkeypatch.context() as patch:
        patch.setattr(engine, "_load", lambda: pytest.fail("setting K loads nothing"))
        engine.num_speculative_tokens = 2
    for k in (2, 1, 3):
        engine.num_speculative_tokens = k
        assert engine.num_speculative_tokens == k
        assert set(proposed(engine, request(5), request(7))) == {k}


def test_k_changes_between_two_steps_of_an_answer(engine: Engine) -> None:
    """A row with more drafts than the next step proposes verifies them all the same."""
    following = iter([1, 3, 2, 1, 3] * 20)

    def change(index: int, text: str) -> None:
        engine.num_speculative_tokens = next(following)

    counts = proposed(engine, request(5, new_tokens=60), on_text=change)
    assert {1, 2, 3} == set(counts)
    answer = engine.generate([request(5, new_tokens=60)], on_text=change).results[0]
    assert answer.token_ids == continuation(5, 60)


@pytest.mark.parametrize(
    ("k", "message"),
    [
        (0, "is 0; choose 1 to 3, what the engine's graph is for"),
        (4, "is 4; choose 1 to 3, what the engine's graph is for"),
        (-1, "is -1; choose 1 to 3"),
        (2.0, "is 2.0; give an integer"),
        (True, "is True; give an integer"),
        (None, "is None; give an integer"),
    ],
)
def test_a_k_that_cannot_be_proposed(engine: Engine, k: Any, message: str) -> None:
    with pytest.raises(InputError, match=f"num_speculative_tokens {message}"):
        engine.num_speculative_tokens = k
    assert engine.num_speculative_tokens == K


def test_a_target_alone_has_no_k(tiny_pair: Callable[[str], TinyPair]) -> None:
    engine = Engine(EngineConfig(model=str(tiny_pair("llama_eagle").target)))
    assert (engine.num_speculative_tokens, engine.max_speculative_tokens) == (0, 0)
    with pytest.raises(InputError, match="num_speculative_tokens is 1, but there is no spec"):
        engine.num_speculative_tokens = 1


def test_each_step_is_told(engine: Engine) -> None:
    """A prompt of three chunks and two short ones: every row of every step, with its tokens."""
    steps: list[tuple[list[Any], list[list[int]]]] = []
    times = []
    asked: list[int] = []

    def tell(step: Step) -> None:
        ids = [one.context.request_id for one in step.rows]
        steps.append((ids, [list(one.token_ids) for one in step.rows]))
        times.append(step.times)
        asked.append(engine.num_requests)

    prompts = [list(range(3, 73)), [5], [9]]
    with observing(engine, tell):
        report = engine.generate([request(*prompt) for prompt in prompts])
    told: dict[Any, list[int]] = {}
    for ids, tokens in steps:
        assert len(set(ids)) == len(ids)
        for request_id, new in zip(ids, tokens, strict=True):
            told.setdefault(request_id, []).extend(new)
    assert sorted(told.values()) == sorted(continuation(prompt[-1], 12) for prompt in prompts)
    assert [] in [new for _, tokens in steps for new in tokens]  # a chunk that is not the last
    assert [step for step in times if step.is_decode] == list(report.decode_steps)
    assert max(asked) == 3
    before = len(steps)
    engine.generate([request(5)])
    assert len(steps) == before


def test_an_error_of_the_hook_fails_the_step(engine: Engine) -> None:
    def fail(step: Step) -> None:
        raise RuntimeError("the disk is full")

    with observing(engine, fail), pytest.raises(RuntimeError, match="the disk is full"):
        engine.generate([request(5)])
    assert_left_empty(engine)
    assert engine.generate([request(5)]).results[0].token_ids == continuation(5, 12)


def test_pages_that_requests_hold_are_not_free(engine: Engine) -> None:
    """One page each holds 128 tokens; they are free again when the answer is complete."""
    assert engine.num_free_pages == engine.num_pages
    held: list[int] = []
    with observing(engine, lambda step: held.append(engine.num_pages - engine.num_free_pages)):
        engine.generate([request(5), request(7), request(9)])
    assert max(held) == 3
    assert engine.num_free_pages == engine.num_pages


def test_the_prefix_cache_is_forgotten(engine: Engine) -> None:
    """A prompt of more than a page is read from its beginning again."""
    prompt = [3 + token % 200 for token in range(140)]

    def read() -> int:
        tokens: list[int] = []

        def count(step: Step) -> None:
            tokens.append(1)

        with observing(engine, count):
            engine.generate([request(*prompt)])
        return len(tokens)

    cold, warm = read(), read()
    assert warm < cold
    engine.reset_prefix_cache()
    assert read() == cold


def test_a_k_for_a_while(engine: Engine) -> None:
    with proposing(engine, 1):
        assert set(proposed(engine, request(5))) == {1}
    assert set(proposed(engine, request(5))) == {K}
