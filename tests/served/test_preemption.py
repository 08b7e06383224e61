"""A request that the scheduler takes out and brings back goes on as if nothing had been."""

from __future__ import annotations

import json
from typing import Any

import pytest
from max.pipelines.context import SamplingParams, TextContext, TextGenerationResponseFormat
from max.pipelines.modeling.types import TextGenerationInputs
from max.pipelines.request import RequestID
from prompts import random_prompt
from scheduling import Scheduled

pytestmark = pytest.mark.compiles("llama_eagle_agreeing")

SCHEMA = {
    "type": "array",
    "items": {"type": "integer", "minimum": 1000, "maximum": 9999},
    "minItems": 6,
    "maxItems": 6,
}
KINDS = {
    "greedy": {"temperature": 0},
    "penalties": {
        "temperature": 0,
        "presence_penalty": 0.7,
        "frequency_penalty": 0.3,
        "repetition_penalty": 1.3,
    },
    "sampled": {"temperature": 0.8, "seed": 7, "top_p": 0.9},
    "minimum": {"temperature": 1.0, "seed": 11, "min_new_tokens": 50, "presence_penalty": 0.5},
    "grammar": {"temperature": 1.0, "seed": 3},
}


def answer(scheduled: Scheduled, kind: str, preempted_at: tuple[int, ...]) -> list[int]:
    """The tokens of an answer, whose request is preempted before these iterations."""
    format_ = TextGenerationResponseFormat(
        type="json_schema", json_schema=SCHEMA, grammar_enforced=True
    )
    fields = {"response_format": format_} if kind == "grammar" else {}
    params = SamplingParams(max_new_tokens=100 if fields else 60, **KINDS[kind])  # type: ignore[arg-type]
    scheduled.pipeline.kv_manager.reset_prefix_cache()
    context = scheduled.context(random_prompt(256, 90, seed=8), params, **fields)
    request_id = scheduled.add(context)
    del context
    begun = [0]

    def preempt(iteration: int) -> None:
        if scheduled.results[request_id]:
            begun[0] += 1
            if begun[0] in preempted_at:
                scheduled.preempt(request_id)
                assert not scheduled.pipeline.model.batch.rows
                assert len(scheduled.pipeline._preempted) == 1

    scheduled.run(preempt)
    assert begun[0] >= max(preempted_at, default=0)
    return scheduled.answer(request_id)


@pytest.mark.parametrize("kind", list(KINDS))
def test_a_preempted_request_answers_as_another(scheduled: Scheduled, kind: str) -> None:
    """Twice: what was an answer is a prompt then."""
    undisturbed = answer(scheduled, kind, ())
    assert answer(scheduled, kind, (4, 9)) == undisturbed
    if kind == "grammar":
        text = scheduled.served.tokenizer.delegate.decode(undisturbed, skip_special_tokens=True)
        assert len(json.loads(text)) == 6


@pytest.mark.parametrize("kind", list(KINDS))
def test_with_ngrams_it_answers_as_with_a_draft(
    looking_up: Scheduled, scheduled: Scheduled, kind: str
) -> None:
    """N-grams are looked up in what is read anew, too, and where a grammar allows few tokens."""
    widths: list[int] = []
    execute = looking_up.pipeline.execute

    def run(inputs: TextGenerationInputs[TextContext]) -> dict[RequestID, Any]:
        outputs = execute(inputs)
        assert looking_up.pipeline.last_step is not None
        widths.append(looking_up.pipeline.last_step.num_verified)
        return outputs

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(looking_up.pipeline, "execute", run)
        assert answer(looking_up, kind, (4, 9)) == answer(scheduled, kind, ())
    assert sum(widths) > 10
    assert max(widths) == 4


def test_a_request_cancelled_while_it_waits_leaves_no_row(scheduled: Scheduled) -> None:
    params = SamplingParams(temperature=0, max_new_tokens=60, ignore_eos=True)
    request_id = scheduled.add(scheduled.context(random_prompt(256, 9, seed=8), params))

    def preempt_and_cancel(iteration: int) -> None:
        if iteration == 4:
            scheduled.preempt(request_id)
            scheduled.cancel(request_id)

    scheduled.run(preempt_and_cancel)
    assert len(scheduled.pipeline._preempted) == 0
