"""A step that fails, a request that cannot run: both end, and nothing else does."""

from __future__ import annotations

import logging
from typing import Any

import numpy as np
import pytest
from max.pipelines.context import GenerationStatus, TextGenerationResponseFormat, TokenBuffer
from max.pipelines.modeling.types import TextGenerationInputs
from prompts import random_prompt
from scheduling import Scheduled, greedy

from unispec.engine import Engine, Request
from unispec.pipelines.served.context import ServedContext

pytestmark = pytest.mark.compiles("llama_eagle_agreeing")


class LibraryPanic(BaseException):
    """As those of libraries written in Rust are no `Exception`."""


def fail_once(patch: pytest.MonkeyPatch, owner: Any, name: str, at: int) -> None:
    """Lets one call of a method fail."""
    method, calls = getattr(owner, name), [0]

    def failing(*arguments: Any, **options: Any) -> Any:
        calls[0] += 1
        if calls[0] == at:
            raise LibraryPanic("the device is gone")
        return method(*arguments, **options)

    patch.setattr(owner, name, failing)


@pytest.mark.parametrize("when", ["in the graph", "after it"])
def test_a_failed_step_ends_its_requests_and_no_others(
    scheduled: Scheduled,
    eagle_engine: Engine,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    when: str,
) -> None:
    """The later request was not in the step; it is answered, and so is the same one again."""
    prompt = random_prompt(256, 40, seed=6)
    ids = [scheduled.add(scheduled.context(prompt[:length], greedy())) for length in (10, 20)]
    pipeline = scheduled.pipeline
    if when == "in the graph":
        fail_once(monkeypatch, pipeline.model, "execute", at=4)
    else:
        fail_once(monkeypatch, pipeline.kv_manager, "step", at=4)
    later: list[Any] = []

    def come(iteration: int) -> None:
        if not later and any(sent and sent[-1].is_done for sent in scheduled.results.values()):
            later.append(scheduled.add(scheduled.context(prompt, greedy())))

    with caplog.at_level(logging.ERROR):
        scheduled.run(come)
        come(0)
        scheduled.run()
    for request_id in ids:
        last = scheduled.outputs(request_id)[-1]
        assert (last.final_status, last.tokens) == (GenerationStatus.CANCELLED, [])
        assert len(scheduled.answer(request_id)) < 40
    assert "the device is gone" in caplog.text
    assert "Traceback" in caplog.text
    scheduled.assert_left_empty()
    expected = eagle_engine.generate([Request(token_ids=prompt, sampling=greedy())]).results[0]
    assert scheduled.answer(later[0]) == expected.token_ids


def test_an_interrupt_is_no_failed_step(
    scheduled: Scheduled, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The worker's end is its server's to decide."""
    context = scheduled.context(random_prompt(256, 9, seed=6), greedy())

    def interrupted(*arguments: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(scheduled.pipeline.kv_manager, "runtime_inputs", interrupted)
        with pytest.raises(KeyboardInterrupt):
            scheduled.pipeline.execute(TextGenerationInputs(batches=[[context]]))
    scheduled.pipeline.release(context.request_id)


def test_a_request_that_has_no_row_fails_alone(scheduled: Scheduled, eagle_engine: Engine) -> None:
    """The tokenizer refuses it; a worker that got it would end without this."""
    prompt = random_prompt(256, 40, seed=6)
    good = scheduled.add(scheduled.context(prompt, greedy()))
    wrong = ServedContext.of(scheduled.context(prompt, greedy()))
    wrong.tokens = TokenBuffer(np.array([5, 300], np.int64))
    bad = scheduled.add(wrong)
    scheduled.run()
    assert [each.final_status for each in scheduled.outputs(bad)] == [GenerationStatus.CANCELLED]
    expected = eagle_engine.generate([Request(token_ids=prompt, sampling=greedy())]).results[0]
    assert scheduled.answer(good) == expected.token_ids


def test_a_grammar_that_cannot_be_compiled_is_answered(scheduled: Scheduled) -> None:
    """With the compiler's words, before the request has a row."""
    ids = [
        scheduled.add(
            scheduled.context(
                random_prompt(256, 9, seed=6),
                greedy(),
                response_format=TextGenerationResponseFormat(
                    type="json_schema", grammar_enforced=True, **fields
                ),
            )
        )
        for fields in ({"json_schema": {"type": "nonsense"}}, {"grammar": "(?=ahead)x"})
    ]
    scheduled.run()
    for request_id, name in zip(ids, ("The JSON schema", "The regex"), strict=True):
        (sent,) = scheduled.results[request_id]
        assert sent.result is None
        assert name in str(sent.error)
        assert "cannot be used" in str(sent.error)
