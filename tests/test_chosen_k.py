"""Answers do not depend on how many tokens a step verifies, nor on who proposed them."""

from __future__ import annotations

import gc
import random
from collections.abc import Callable
from functools import partial

import pytest
from max.pipelines.context import SamplingParams
from prompts import random_prompt
from reference.lookup import looked_up
from runs import MAX_LENGTH, assert_left_empty, observing
from tiny import TinyPair

from unispec.batch_schedule import BatchSchedule
from unispec.engine import Engine, EngineConfig, Report, Request, Step
from unispec.errors import InputError
from unispec.pipelines.lookup.automaton import SuffixAutomaton

PAIR = "llama_eagle_agreeing"
ALONE = BatchSchedule(((1, 11, 0), (12, 12, 1)))
"""K = 0 for the batches of these tests."""
NEW_TOKENS = 40


def prompts() -> list[list[int]]:
    """Some that repeat themselves, so that there is something to look up."""
    words = [random_prompt(256, 7, seed=seed) for seed in range(4)]
    loops = [word * 6 for word in words]
    return [*loops, *(random_prompt(256, length, seed=length) for length in (1, 64, 130, 200))]


def requests(*, temperature: float) -> list[Request]:
    sampling = partial(SamplingParams, max_new_tokens=NEW_TOKENS, temperature=temperature)
    return [
        Request(token_ids=prompt, sampling=sampling(seed=seed))
        for seed, prompt in enumerate(prompts())
    ]


def tokens(report: Report) -> list[list[int]]:
    return [result.token_ids for result in report.results]


@pytest.fixture(scope="module")
def alone(target_only_engine: Engine) -> Callable[[float], list[list[int]]]:
    answers: dict[float, list[list[int]]] = {}

    def of(temperature: float) -> list[list[int]]:
        if temperature not in answers:
            asked = requests(temperature=temperature)
            answers[temperature] = tokens(target_only_engine.generate(asked))
        return answers[temperature]

    return of


def engine_of(pair: TinyPair, **options: object) -> Engine:
    config: dict[str, object] = {
        "model": str(pair.target),
        "max_batch_size": 8,
        "max_batch_input_tokens": 64,
        "max_length": MAX_LENGTH,
    }
    return Engine(EngineConfig(**(config | options)))  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def ngram_engine(tiny_pair: Callable[[str], TinyPair], target_only_engine: Engine) -> Engine:
    return engine_of(tiny_pair(PAIR), speculative_method="ngram", num_speculative_tokens=6)


@pytest.fixture(scope="module")
def auto_engine(tiny_pair: Callable[[str], TinyPair]) -> Engine:
    pair = tiny_pair(PAIR)
    return engine_of(pair, draft_model=str(pair.draft), speculative_method="eagle")


@pytest.mark.compiles(PAIR)
@pytest.mark.parametrize("temperature", [0.0, 0.7])
def test_ngrams_change_no_answer(
    ngram_engine: Engine, alone: Callable[[float], list[list[int]]], temperature: float
) -> None:
    report = ngram_engine.generate(requests(temperature=temperature))
    assert tokens(report) == alone(temperature)
    assert report.speculation is not None
    assert report.speculation.sources["ngram"].drafted > 0
    assert report.speculation.sources["draft"].drafted == 0
    assert set(report.speculation.steps_by_proposed) == {0}
    assert_left_empty(ngram_engine)


@pytest.mark.compiles(PAIR)
@pytest.mark.parametrize("seed", [3, 4])
def test_ngrams_are_what_a_search_through_the_text_finds(ngram_engine: Engine, seed: int) -> None:
    sampling = SamplingParams(temperature=0, max_new_tokens=200, ignore_eos=True)
    prompt = random_prompt(256, 9, seed=seed) * 3
    steps: list[tuple[int, list[int]]] = []

    def note(step: Step) -> None:
        ((row,),) = [step.rows]
        steps.append((step.times.num_verified, list(row.token_ids)))

    with observing(ngram_engine, note):
        ngram_engine.generate([Request(token_ids=prompt, sampling=sampling)])
    text, verified = list(prompt), 0
    # The last step is cut where the answer ends.
    for count, emitted in steps[:-1]:
        expected = looked_up(text, 6, 2, 16) if len(text) > len(prompt) else []
        # The last token of an answer is nobody's draft, and what is behind it is none.
        expected = expected[: len(prompt) + 200 - len(text) - 1]
        assert count == len(expected)
        agreed = len(emitted) - 1
        assert emitted[:agreed] == expected[:agreed]
        assert agreed == len(expected) or emitted[agreed] != expected[agreed]
        text += emitted
        verified += count
    assert verified > 50


@pytest.mark.compiles(PAIR)
@pytest.mark.parametrize("temperature", [0.0, 0.7])
@pytest.mark.parametrize("seed", [1, 2])
def test_with_any_schedule_of_k_the_answers_are_the_same(
    tiny_engine: Callable[[str], Engine],
    alone: Callable[[float], list[list[int]]],
    temperature: float,
    seed: int,
) -> None:
    engine = tiny_engine(PAIR)
    draw, before = random.Random(seed), engine.num_speculative_tokens
    proposed: list[int] = []

    def choose(step: Step) -> None:
        proposed.append(step.times.num_proposed)
        count = draw.choice([0, 0, 1, 2, 3, 5, 8])
        engine.num_speculative_tokens = count or ALONE

    with observing(engine, choose):
        report = engine.generate(requests(temperature=temperature))
    engine.num_speculative_tokens = before
    assert tokens(report) == alone(temperature)
    assert {0, 1, 8} <= set(proposed)
    assert_left_empty(engine)


@pytest.mark.compiles(PAIR)
@pytest.mark.parametrize("temperature", [0.0, 0.7])
def test_what_steps_choose_changes_no_answer(
    auto_engine: Engine, alone: Callable[[float], list[list[int]]], temperature: float
) -> None:
    report = auto_engine.generate(requests(temperature=temperature))
    assert tokens(report) == alone(temperature)
    found = report.speculation
    assert found is not None
    assert found.num_speculative_tokens == "auto"
    assert len(found.expected_tokens_per_second) == auto_engine.max_speculative_tokens + 1
    assert all(rate > 0 for rate in found.expected_tokens_per_second)
    assert sum(found.steps_by_verified.values()) == report.steps
    assert_left_empty(auto_engine)


@pytest.mark.compiles(PAIR)
def test_the_text_of_a_finished_request_is_not_kept(ngram_engine: Engine) -> None:
    """Though its answer is, until all are there."""

    def held() -> int:
        found = (one for one in gc.get_objects() if isinstance(one, SuffixAutomaton))
        return sum(bool(one.tokens) for one in found)

    before, running = held(), []

    def note(step: Step) -> None:
        running.append((len(step.rows), held() - before))

    asked = [
        Request(
            token_ids=random_prompt(256, 7, seed=count),
            sampling=SamplingParams(temperature=0, max_new_tokens=4 * count, ignore_eos=True),
        )
        for count in (1, 2, 3, 8)
    ]
    with observing(ngram_engine, note):
        ngram_engine.generate(asked)
    assert {rows for rows, _ in running} == {1, 2, 3, 4}
    assert all(automata <= rows for rows, automata in running)
    assert held() == before


@pytest.mark.compiles(PAIR)
def test_draft_and_ngrams_propose_in_one_batch(
    tiny_pair: Callable[[str], TinyPair], alone: Callable[[float], list[list[int]]]
) -> None:
    pair = tiny_pair(PAIR)
    engine = engine_of(
        pair,
        draft_model=str(pair.draft),
        speculative_method="eagle",
        num_speculative_tokens=4,
        prompt_lookup_max=8,
        prompt_lookup_store=1000,
    )
    for temperature in (0.0, 0.7):
        report = engine.generate(requests(temperature=temperature))
        assert tokens(report) == alone(temperature)
        assert report.speculation is not None
        assert all(found.drafted for found in report.speculation.sources.values())


@pytest.mark.compiles(PAIR)
def test_a_schedule_of_batch_sizes_is_followed(tiny_engine: Callable[[str], Engine]) -> None:
    engine = tiny_engine(PAIR)
    before = engine.num_speculative_tokens
    seen: dict[int, set[int]] = {}

    def note(step: Step) -> None:
        if step.times.is_decode:
            seen.setdefault(step.times.num_rows, set()).add(step.times.num_proposed)

    engine.num_speculative_tokens = BatchSchedule(((1, 1, 4), (2, 3, 2), (4, 12, 1)))
    with observing(engine, note):
        asked = [
            Request(
                token_ids=random_prompt(256, 5, seed=count),
                sampling=SamplingParams(temperature=0, max_new_tokens=8 * count, ignore_eos=True),
            )
            for count in range(1, 6)
        ]
        engine.generate(asked)
    engine.num_speculative_tokens = before
    # For the last token of the last answer nothing is proposed.
    assert {rows: seen[rows] - {0} for rows in (1, 3, 5)} == {1: {4}, 3: {2}, 5: {1}}


@pytest.mark.compiles(PAIR)
@pytest.mark.parametrize("count", [0, 9, True, "fast", 1.5, None])
def test_another_k_than_the_graph_has_is_refused(
    tiny_engine: Callable[[str], Engine], count: object
) -> None:
    with pytest.raises(InputError, match=r"num_speculative_tokens is"):
        tiny_engine(PAIR).num_speculative_tokens = count  # type: ignore[assignment]


@pytest.mark.compiles(PAIR)
def test_an_engine_that_was_not_built_for_it_does_not_choose(
    tiny_engine: Callable[[str], Engine],
) -> None:
    with pytest.raises(InputError, match=r"'auto'.*build it with 'auto'"):
        tiny_engine(PAIR).num_speculative_tokens = "auto"
