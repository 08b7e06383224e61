"""The documented inputs of the MTP graph: masks on the host, drafts of the caller, order."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from max.driver import Buffer
from max.dtype import DType
from max.pipelines.context import SamplingParams, TextContext, TokenBuffer
from prompts import random_prompt

from unispec.errors import InputError
from unispec.pipelines.runtime import Engine

VOCAB = 256
NAMES = pytest.mark.parametrize("name", ["G"])


class Step:
    """One request of a pair, and its first step's inputs."""

    def __init__(self, engine: Engine) -> None:
        self.model: Any = engine.pipeline.model
        self.manager: Any = engine.pipeline.kv_manager
        self.manager.reset_prefix_cache()
        self.context = TextContext(
            max_length=60,
            tokens=TokenBuffer(np.array(random_prompt(VOCAB, 9, seed=1), np.int64)),
            sampling_params=SamplingParams(temperature=0),
        )
        self.manager.claim(self.context)
        self.manager.alloc(self.context)

    def inputs(self, **options: Any) -> Any:
        caches = self.manager.runtime_inputs([[self.context]])
        return self.model.prepare_initial_token_inputs([[self.context]], caches, **options)


@pytest.fixture
def step(tiny_engine: Callable[[str], Engine], name: str) -> Iterator[Step]:
    engine = tiny_engine(name)
    made = Step(engine)
    yield made
    made.manager.release(made.context)
    engine.pipeline.release(made.context.request_id)


def mask(*allowed: int) -> Buffer:
    tokens = np.zeros((1, 1, VOCAB), bool)
    tokens[..., list(allowed)] = True
    return Buffer.from_numpy(tokens)


@NAMES
def test_a_pinned_mask_decides_which_tokens_are_allowed(step: Step) -> None:
    free = int(step.model.execute(step.inputs()).next_tokens.to_numpy()[0])
    for allowed in ([3], [31, 32, 33], [255], [free, 7]):
        inputs = replace(step.inputs(), pinned_bitmask=mask(*allowed))
        token = int(step.model.execute(inputs).next_tokens.to_numpy()[0])
        assert token in allowed
        assert (token == free) == (free in allowed)


@NAMES
def test_a_pinned_mask_of_another_shape_is_refused(step: Step) -> None:
    wrong = Buffer.from_numpy(np.ones((1, 2, VOCAB), bool))
    with pytest.raises(InputError, match=r"pinned_bitmask has shape \[1, 2, 256\].*\[1, 1, 256\]"):
        step.model.execute(replace(step.inputs(), pinned_bitmask=wrong))


@NAMES
def test_inputs_that_the_graph_does_not_take_are_refused(step: Step) -> None:
    buffer = Buffer.zeros([2], DType.int64)
    for field in ("wait_payload", "device_bitmask_scratch", "draft_kv_blocks", "lora_ids"):
        value = [buffer] if field == "draft_kv_blocks" else buffer
        with pytest.raises(InputError, match=f"{field} is set"):
            step.model.execute(replace(step.inputs(), **{field: value}))
    with pytest.raises(InputError, match="draft_kv_cache_buffers is set"):
        step.inputs(draft_kv_cache_buffers=[buffer])
    with pytest.raises(InputError, match="unheard_of is set"):
        step.inputs(unheard_of=1)


@NAMES
def test_drafts_of_the_caller_are_verified(step: Step) -> None:
    """The step after the first verifies what it is given; the right drafts are accepted."""
    outputs = step.model.execute(step.inputs())
    token = int(outputs.next_tokens.to_numpy()[0])
    step.context.advance_token_buffer(token)
    step.manager.step(step.context)
    row = step.model.batch.row(step.context)
    row.generated, row.drafts = 1, [0, 0]
    step.context.spec_decoding_state.draft_tokens_to_verify = [-1, -1]
    step.manager.alloc(step.context)

    def accepted(*drafts: int) -> tuple[int, int]:
        given = Buffer.from_numpy(np.array([drafts], np.int64))
        outputs = step.model.execute(step.inputs(draft_tokens=given))
        return (
            int(outputs.num_accepted_draft_tokens.to_numpy()[0]),
            int(outputs.next_tokens.to_numpy()[0]),
        )

    none, first = accepted(-1, -1)
    assert none == 0
    one, second = accepted(first, -1)
    assert one == 1
    assert accepted(first, second)[0] == 2
    assert accepted((first + 1) % VOCAB, second) == (0, first)
    with pytest.raises(InputError, match=r"draft_tokens has shape \[1, 3\].*\[1, 2\]"):
        accepted(1, 2, 3)


@NAMES
def test_the_graph_takes_its_inputs_in_the_documented_order(step: Step) -> None:
    inputs = step.inputs()
    first = inputs.buffers[:4]
    assert first[0] is inputs.tokens
    assert first[1] is inputs.input_row_offsets
    assert first[2] is inputs.host_input_row_offsets
    assert first[3] is inputs.return_n_logits
    assert inputs.buffers[4] is inputs.data_parallel_splits
    assert inputs.signal_buffers == []
    assert inputs.host_input_row_offsets.to_numpy().tolist() == [0, 9]
    assert inputs.data_parallel_splits.to_numpy().tolist() == [0, 1]
    assert [b.to_numpy().tolist() for b in inputs.batch_context_lengths] == [[128]]
    assert len(inputs.buffers) == len(step.model.model.input_metadata)
