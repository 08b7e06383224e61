"""Decode steps enqueued before the last one was read: their order, their memory, their answers."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from max.driver import CPU, Buffer
from max.dtype import DType
from max.pipelines.context import SamplingParams
from max.pipelines.modeling.types import TextGenerationInputs
from numpy_graph import NumpyGraph, continuation, numpy_engine
from prompts import random_prompt
from runs import assert_left_empty, observing
from tiny import TinyPair, tiny_eagle, tiny_llama

from unispec.engine import Engine, Request, Step
from unispec.pipelines.runtime.ahead import LookAhead
from unispec.pipelines.runtime.readback import Readback, Reading
from unispec.pipelines.speculative.step import INPUT_ORDER

Made = tuple[Engine, NumpyGraph, LookAhead]


def looking_ahead(engine: Engine) -> LookAhead:
    """Lets an engine on a CPU do what one on a GPU does."""
    pipeline = engine.pipeline
    pipeline.ahead = ahead = LookAhead(pipeline.model, pipeline.kv_manager)
    return ahead


@pytest.fixture
def made(tiny_pair: Callable[[str], TinyPair], monkeypatch: pytest.MonkeyPatch) -> Iterator[Made]:
    with numpy_engine(tiny_pair("llama_eagle"), monkeypatch) as (engine, graph):
        yield engine, graph, looking_ahead(engine)


@pytest.fixture
def order(made: Made, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What happens: a graph runs, a report is read."""
    events: list[str] = []
    _, graph, _ = made
    graph.before = lambda last: events.append("run")
    wait = Reading.wait
    monkeypatch.setattr(Reading, "wait", lambda reading: (events.append("read"), wait(reading))[1])
    return events


def asked(token: int, count: int, **params: Any) -> Request:
    sampling = SamplingParams(temperature=0, max_new_tokens=count, **params)
    return Request(token_ids=[5, token], sampling=sampling)


def answered(engine: Engine, requests: Sequence[Request]) -> list[list[int]]:
    return [result.token_ids for result in engine.generate(requests).results]


def test_a_decode_step_is_enqueued_before_the_last_one_is_read(
    made: Made, order: list[str]
) -> None:
    engine, _, ahead = made
    assert answered(engine, [asked(9, 40), asked(10, 40)]) == [
        continuation(9, 40),
        continuation(10, 40),
    ]
    # The prompt's step, the first decode step, and from then on one step ahead.
    assert order[:8] == ["run", "read", "run", "run", "read", "run", "read", "run"]
    taken = ahead.num_taken
    assert taken >= 8
    # Where an answer may end, the host has to see it first.
    assert order[-1] == "read"
    assert order.count("run") == order.count("read") + ahead.num_dropped


def test_cache_lengths_are_those_of_steps_that_the_host_has_read(
    tiny_pair: Callable[[str], TinyPair], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both caches', taken from the device, while the host knows an upper bound only."""
    seen: list[list[list[Any]]] = []
    for ahead in (False, True):
        with numpy_engine(tiny_pair("llama_eagle"), monkeypatch) as (engine, graph):
            lengths: list[list[Any]] = []
            run = graph.execute

            def execute(*buffers: Buffer, run: Any = run, into: Any = lengths) -> list[Buffer]:
                caches = [one for one in buffers[6:20] if one.dtype.name == "uint32"]
                rows = buffers[1].shape[0] - 1
                into.append([one.to_numpy().tolist() for one in caches if one.shape == (rows,)])
                return run(*buffers)

            monkeypatch.setattr(graph, "execute", execute)
            if ahead:
                looking_ahead(engine)
            answered(engine, [asked(9, 60), asked(77, 60), asked(21, 60)])
            seen.append(lengths)
    assert all(len(step) >= 2 for step in seen[1])
    steady = [step for step in seen[0] if step in seen[1]]
    assert len(steady) == len(seen[0])


def test_a_request_that_ends_takes_the_others_step_with_it(made: Made, order: list[str]) -> None:
    """The others use theirs: what was enqueued for the one that ended is left aside."""
    engine, _, ahead = made
    stop = continuation(9, 12)[10]
    requests = [asked(9, 60, stop_token_ids=[stop]), asked(10, 60)]
    first, second = answered(engine, requests)
    assert first == continuation(9, 11)
    assert second == continuation(10, 60)
    assert ahead.num_dropped == 0
    assert ahead.num_taken > 10


def test_a_request_that_comes_drops_what_was_enqueued(made: Made) -> None:
    engine, _, ahead = made
    engine.add(asked(9, 60))
    for _ in range(6):
        engine.step()
    assert ahead.num_taken > 2
    engine.add(asked(10, 30))
    tokens: dict[Any, list[int]] = {}
    dropped = ahead.num_dropped
    while engine.unfinished:
        for output in engine.step():
            if output.result is not None:
                tokens[output.request_id] = output.result.token_ids
    assert list(tokens.values()) == [continuation(10, 30), continuation(9, 60)]
    assert ahead.num_dropped == dropped + 1


def test_another_k_drops_what_was_enqueued(made: Made) -> None:
    engine, _, ahead = made
    widths: list[int] = []

    def note(step: Any) -> None:
        widths.append(step.times.num_verified)
        if len(widths) == 6:
            engine.num_speculative_tokens = 1

    engine.on_step = note
    assert answered(engine, [asked(9, 60)]) == [continuation(9, 60)]
    assert ahead.num_dropped == 1
    assert widths[:6] == [0, 3, 3, 3, 3, 3]
    assert set(widths[6:]) == {1}


def test_other_drafts_drop_what_was_enqueued(made: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    """As many as the draft's, but found elsewhere; and right, while one of the draft's is wrong."""
    engine, _, ahead = made
    pipeline = engine.pipeline
    right = continuation(9, 60)
    execute = pipeline.execute
    given: list[int] = []

    def give(inputs: Any) -> Any:
        (context,) = inputs.flat_batch
        row = pipeline.model.batch.row(context)
        if row.generated in range(12, 40):
            row.drafts = right[row.generated :][:3]
            given.append(row.generated)
        return execute(inputs)

    monkeypatch.setattr(pipeline, "speculation", None)
    monkeypatch.setattr(pipeline, "execute", give)
    assert answered(engine, [asked(9, 60)]) == [right]
    assert len(given) == 7  # each brings four tokens
    assert ahead.num_dropped == 7


@pytest.mark.parametrize(
    "params",
    [
        {"min_new_tokens": 40},
        {"frequency_penalty": 0.5},
    ],
    ids=["an end that is masked", "a penalty"],
)
def test_a_row_that_needs_the_host_is_waited_for(
    made: Made, order: list[str], params: dict[str, Any]
) -> None:
    engine, _, ahead = made
    requests = [asked(9, 40), asked(10, 40, **params)]
    assert answered(engine, requests)[0] == continuation(9, 40)
    assert ahead.num_taken == 0
    # Once it was waited for, nothing of it stays.
    assert order == ["run", "read"] * (len(order) // 2)


def test_log_probabilities_are_waited_for(target_only_engine: Engine) -> None:
    sampling = SamplingParams(temperature=0, max_new_tokens=30)
    requests = [
        Request(token_ids=[5, token], sampling=sampling, logprobs=logprobs)
        for token, logprobs in ((9, None), (10, 2))
    ]
    ahead = looking_ahead(target_only_engine)
    try:
        target_only_engine.generate(requests)
        assert ahead.num_taken == 0
        target_only_engine.generate(requests[:1])
        assert ahead.num_taken > 20
    finally:
        target_only_engine.pipeline.ahead = None


def test_a_batch_in_another_order_is_not_followed(
    made: Made, order: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its steps would have one request's pages and another one's tokens."""
    engine, graph, ahead = made
    pipeline = engine.pipeline
    execute = pipeline.execute
    steps = 0

    def turned(inputs: Any) -> Any:
        nonlocal steps
        steps += 1
        batch = inputs.flat_batch
        return execute(TextGenerationInputs(batches=[batch[:: -1 if steps % 2 else 1]]))

    monkeypatch.setattr(pipeline, "execute", turned)
    table = INPUT_ORDER.index("kv_cache_inputs") + 2
    run = graph.execute
    tables: set[tuple[tuple[int, ...], tuple[int, ...]]] = set()

    def note(*buffers: Buffer) -> list[Buffer]:
        rows = [tuple(row) for row in buffers[table].to_numpy().tolist()]
        tables.add((tuple(sorted(rows)), tuple(rows)))
        return run(*buffers)

    monkeypatch.setattr(graph, "execute", note)
    expected = [continuation(9, 40), continuation(10, 40)]
    assert answered(engine, [asked(9, 40), asked(10, 40)]) == expected
    # What was enqueued is in the last batch's order, and serves; nothing follows that.
    assert ahead.num_taken > 3
    assert ahead.num_dropped == 0
    assert "run read run run read read" in " ".join(order)


def test_a_step_that_failed_is_not_made_up_for_by_the_next(
    made: Made, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A program of its own may run the failed step again."""
    engine, _, ahead = made
    pipeline = engine.pipeline
    execute, wait = pipeline.execute, Reading.wait
    failed: list[int] = []

    def fails(reading: Reading) -> Any:
        if ahead.num_taken == 4 and not failed:
            failed.append(1)
            raise OSError("the report is lost")
        return wait(reading)

    def again(inputs: Any) -> Any:
        try:
            return execute(inputs)
        except OSError:
            return execute(inputs)

    monkeypatch.setattr(Reading, "wait", fails)
    monkeypatch.setattr(pipeline, "execute", again)
    assert answered(engine, [asked(9, 60)]) == [continuation(9, 60)]
    assert failed
    assert ahead.num_dropped == 1


def test_a_step_is_whole_though_the_next_cannot_be_enqueued(
    made: Made, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    engine, _, ahead = made
    pipeline = engine.pipeline

    def fails(*_: Any) -> Any:
        raise MemoryError("no room")

    monkeypatch.setattr(pipeline.model, "following_inputs", fails)
    assert answered(engine, [asked(9, 60)]) == [continuation(9, 60)]
    assert pipeline.ahead is None
    assert ahead.num_taken == 0
    assert caplog.text.count("none will be from now on") == 1


@pytest.mark.parametrize("reserved", [True, False])
def test_rows_have_no_pages_that_they_do_not_come_near(
    tiny_pair: Callable[[str], TinyPair], monkeypatch: pytest.MonkeyPatch, reserved: bool
) -> None:
    """Where pages are reserved all of a request are looked up at once."""
    with numpy_engine(tiny_pair("llama_eagle"), monkeypatch) as (engine, _):
        pipeline = engine.pipeline
        pipeline.ahead = LookAhead(pipeline.model, pipeline.kv_manager, has_reserved_pages=reserved)
        free: list[int] = []
        engine.on_step = lambda step: free.append(engine.num_free_pages)
        assert answered(engine, [asked(9, 220)]) == [continuation(9, 220)]
        taken = [engine.num_pages - left for left in free[2:10]]
        # The request has 222 tokens, these steps 40 at most, of pages of 128.
        assert set(taken) == {2 if reserved else 1}
        engine.on_step = None


def test_what_was_found_in_the_text_is_waited_for(
    tiny_pair: Callable[[str], TinyPair], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As long as nothing is found the draft is asked, and the next step is enqueued."""
    with numpy_engine(tiny_pair("llama_eagle"), monkeypatch, prompt_lookup_max=3) as (engine, _):
        ahead = looking_ahead(engine)
        assert answered(engine, [asked(9, 40)]) == [continuation(9, 40)]
        assert ahead.num_taken > 8
        assert ahead.num_dropped == 0
        before = ahead.num_taken
        # What it answers is all in its prompt.
        prompt = [9, *continuation(9, 60), 9]
        request = Request(
            token_ids=prompt, sampling=SamplingParams(temperature=0, max_new_tokens=40)
        )
        assert answered(engine, [request]) == [continuation(9, 40)]
        assert ahead.num_taken - before + ahead.num_dropped <= 2


def test_a_thousand_steps_use_the_same_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same objects; those of the caches are looked up again once a page."""
    target = tiny_llama(
        tmp_path / "target",
        hidden_size=16,
        intermediate_size=32,
        layers=1,
        heads=1,
        kv_heads=1,
        head_dim=16,
        vocab_size=256,
        tie=True,
        max_position_embeddings=8192,
    )
    pair = TinyPair(target, tiny_eagle(tmp_path / "draft", target))
    with numpy_engine(pair, monkeypatch, max_length=8192) as (engine, graph):
        ahead = looking_ahead(engine)
        steps: list[tuple[int, ...]] = []
        alive: list[Any] = []
        run = graph.execute

        def execute(*buffers: Buffer) -> list[Buffer]:
            steps.append(tuple(map(id, buffers)))
            alive.append(buffers)  # no identity is given twice
            return run(*buffers)

        monkeypatch.setattr(graph, "execute", execute)
        count = 3200
        assert answered(engine, [asked(9, count, ignore_eos=True)]) == [continuation(9, count)]
        assert ahead.num_taken > 1000
        assert ahead.num_dropped == 0
        steady = steps[2:-6]  # the last ones are waited for, as the answer ends
        cache = INPUT_ORDER.index("kv_cache_inputs")
        objects = [len(set(column)) for column in zip(*steady, strict=True)]
        assert set(objects[: cache + 1]) == {1}  # tokens to the pages of the target
        pages = -(-count // engine.pipeline.model.kv_params.page_size)
        assert set(objects[cache + 1 :]) <= {1, *range(pages - 1, pages + 2)}
        # Of both caches: tables, bounds and strides, but neither pages nor lengths.
        assert sum(number > 1 for number in objects) == 2 * 6


class Recorder:
    """As MAX's model records steps: what the host had given stays as it was; runs nothing then."""

    def __init__(self, graph: NumpyGraph) -> None:
        self.graph = graph
        self.recorded: dict[int, tuple[tuple[Buffer, ...], list[Any], list[Buffer]]] = {}
        self.log: list[str] = []
        self.able = True

    def execute(self, *buffers: Buffer) -> list[Buffer]:
        self.log.append("execute")
        return self.graph.execute(*buffers)

    def capture(self, key: int, *buffers: Buffer) -> list[Buffer]:
        if not self.able:
            raise RuntimeError("a copy to the host")
        assert key not in self.recorded
        self.log.append("capture")
        outputs = [Buffer.zeros(one.shape, one.dtype) for one in self.graph.execute(*buffers)]
        self.recorded[key] = buffers, self._said(buffers), outputs
        return outputs

    def replay(self, key: int, *buffers: Buffer) -> None:
        self.log.append("replay")
        # The device does one thing after the other, and has copied the last report by now.
        CPU().synchronize()
        recorded, said, outputs = self.recorded[key]
        assert all(map(operator.is_, recorded, buffers))
        assert all(map(np.array_equal, said, self._said(buffers)))
        for into, new in zip(outputs, self.graph.execute(*buffers), strict=True):
            into.to_numpy()[...] = new.to_numpy()

    def _said(self, buffers: Sequence[Buffer]) -> list[Any]:
        """What a recorded step takes as it was: all but tokens, drafts, pages and lengths."""
        lengths = [
            one for one in buffers if one.shape == buffers[7].shape and one.dtype == DType.uint32
        ]
        changing = [buffers[0], buffers[3], *lengths]
        return [
            one.to_numpy().copy()
            for one in buffers
            if len(one.shape) < 5 and not any(one is other for other in changing)
        ]

    def release_captured_graph(self, key: int) -> None:
        del self.recorded[key]


@pytest.mark.parametrize("able", [True, False])
def test_a_step_that_comes_again_is_recorded(
    tiny_pair: Callable[[str], TinyPair],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    able: bool,
) -> None:
    """Once for as long as its pages last; where MAX cannot record it, it is launched."""
    with numpy_engine(tiny_pair("llama_eagle"), monkeypatch) as (engine, graph):
        pipeline = engine.pipeline
        recorder: Any = Recorder(graph)
        recorder.able = able
        pipeline.model.model = recorder
        # All replays write one report, so it is copied before the next one.
        monkeypatch.setattr(pipeline, "_reading", Readback(CPU()).start)
        pipeline.ahead = LookAhead(pipeline.model, pipeline.kv_manager, captures=True)
        assert answered(engine, [asked(9, 200)]) == [continuation(9, 200)]
        # 200 tokens are on two pages of 128.
        assert recorder.log.count("capture") == (2 if able else 0)
        assert (recorder.log.count("replay") > 40) is able
        pipeline.ahead.forget()
        assert not recorder.recorded
        warned = "cannot record steps, they are launched: a copy to the host"
        assert caplog.text.count(warned) == (0 if able else 1)


def observed(engine: Engine, requests: Sequence[Request]) -> tuple[list[Any], list[list[Any]]]:
    """The answers, and what each step brought and proposed for each of them."""
    steps: dict[Any, list[Any]] = {}

    def note(step: Step) -> None:
        for one in step.rows:
            proposed = [] if one.context.is_done else list(one.row.drafts)
            steps.setdefault(one.context.request_id, []).append((list(one.token_ids), proposed))

    engine.reset_prefix_cache()
    with observing(engine, note):
        report = engine.generate(requests)
    assert_left_empty(engine)
    return [result.token_ids for result in report.results], list(steps.values())


@pytest.mark.parametrize(
    "name",
    [
        "llama_eagle_agreeing",
        "llama_eagle3_agreeing",
        "llama_dflash_agreeing",
        "deepseek_mtp_agreeing",
        "deepseek_mtp",
    ],
)
def test_answers_and_proposals_are_those_of_steps_that_wait(
    tiny_engine: Callable[[str], Engine], tiny_pair: Callable[[str], TinyPair], name: str
) -> None:
    """Step by step, greedy and seeded, of answers that end apart and outgrow their pages."""
    engine, relaxed = tiny_engine(name), tiny_pair(name).relaxed
    requests = [
        Request(
            token_ids=random_prompt(engine.vocab_size, 30 + 25 * index, seed=index),
            sampling=SamplingParams(
                temperature=0.8 * (index % 2),
                seed=index,
                max_new_tokens=40 + 35 * index,
                ignore_eos=index != 3,
            ),
        )
        for index in range(5)
    ]
    expected = observed(engine, requests)
    ahead = looking_ahead(engine)
    try:
        assert observed(engine, requests) == expected
    finally:
        engine.pipeline.ahead = None
    steps = max(map(len, expected[1]))
    # In a thinking block the host says how far relaxed acceptance goes.
    assert ahead.num_taken > steps / 2 or (relaxed and not ahead.num_taken)
    assert ahead.num_dropped < 5


def test_a_target_alone_looks_ahead(target_only_engine: Engine) -> None:
    requests = [asked(token, 100, ignore_eos=True) for token in (9, 10)]
    expected = observed(target_only_engine, requests)
    ahead = looking_ahead(target_only_engine)
    try:
        assert observed(target_only_engine, requests) == expected
    finally:
        target_only_engine.pipeline.ahead = None
    assert ahead.num_taken > 90


def test_reports_come_back_through_memory_that_is_used_again() -> None:
    """Two at a time: one is read while the next one is written."""
    readback = Readback(CPU())
    reports = [np.arange(12, dtype=np.int64).reshape(3, 4) * factor for factor in (1, -7, 3)]
    first = readback.start(Buffer.from_numpy(reports[0]))
    second = readback.start(Buffer.from_numpy(reports[1]))
    np.testing.assert_array_equal(first.wait(), reports[0])
    third = readback.start(Buffer.from_numpy(reports[2][:2]))
    np.testing.assert_array_equal(second.wait(), reports[1])
    np.testing.assert_array_equal(third.wait(), reports[2][:2])
