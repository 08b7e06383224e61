"""The documented inputs of the MTP graph: masks on the host, drafts of the caller, order."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from max.driver import Buffer
from max.dtype import DType
from max.pipelines.context import SamplingParams, TextContext, TokenBuffer
from prompts import random_prompt

from unispec.engine import Engine
from unispec.errors import InputError

VOCAB = 256
PROMPT = random_prompt(VOCAB, 9, seed=1)
NAMES = pytest.mark.parametrize("name", ["deepseek_mtp_agreeing", "deepseek_mtp_sampled"])


class Step:
    """One request of a pair, and its first step's inputs."""

    def __init__(self, engine: Engine, prompt: Sequence[int]) -> None:
        self.model: Any = engine.pipeline.model
        self.manager: Any = engine.pipeline.kv_manager
        self.manager.reset_prefix_cache()
        self.context = TextContext(
            max_length=60,
            tokens=TokenBuffer(np.array(prompt, np.int64)),
            sampling_params=SamplingParams(temperature=0),
        )
        self.manager.claim(self.context)
        self.manager.alloc(self.context)

    def begin(self) -> list[int]:
        """Runs the first step; the next one verifies two drafts. Returns all tokens so far."""
        outputs = self.model.execute(self.inputs())
        self.context.advance_token_buffer(int(outputs.next_tokens.to_numpy()[0]))
        self.manager.step(self.context)
        row = self.model.batch.row(self.context)
        row.generated, row.drafts = 1, [0, 0]
        self.context.spec_decoding_state.draft_tokens_to_verify = [-1, -1]
        self.manager.alloc(self.context)
        return self.context.tokens.all.tolist()

    def verify(self, *drafts: int) -> tuple[int, int]:
        """How many of the drafts are accepted, and the token after those."""
        given = Buffer.from_numpy(np.array([drafts], np.int64))
        outputs = self.model.execute(self.inputs(draft_tokens=given))
        return (
            int(outputs.num_accepted_draft_tokens.to_numpy()[0]),
            int(outputs.next_tokens.to_numpy()[0]),
        )

    def inputs(self, **options: Any) -> Any:
        caches = self.manager.runtime_inputs([[self.context]])
        return self.model.prepare_initial_token_inputs([[self.context]], caches, **options)


@contextmanager
def stepping(engine: Engine, prompt: Sequence[int]) -> Iterator[Step]:
    made = Step(engine, prompt)
    yield made
    made.manager.release(made.context)
    engine.pipeline.release(made.context.request_id)


@pytest.fixture
def step(tiny_engine: Callable[[str], Engine], name: str) -> Iterator[Step]:
    with stepping(tiny_engine(name), PROMPT) as made:
        yield made


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
def test_a_graph_with_late_masks_needs_them_all(
    step: Step, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the host checks before the step, which only a GPU can run."""
    monkeypatch.setattr(step.model, "_late_masks", True)
    words, payload = Buffer.zeros([1, 1, VOCAB // 32], DType.int32), Buffer.zeros([2], DType.int64)
    given = {"pinned_bitmask": words, "wait_payload": payload, "device_bitmask_scratch": words}
    for field in given:
        with pytest.raises(InputError, match=f"{field} is not set, but the compiled graph needs"):
            step.model.execute(replace(step.inputs(), **{**given, field: None}))
        wrong = {**given, field: Buffer.zeros([3], DType.int64)}
        with pytest.raises(InputError, match=rf"{field} has shape \[3\], the step needs"):
            step.model.execute(replace(step.inputs(), **wrong))


@NAMES
def test_late_masks_stand_where_the_mask_is(step: Step) -> None:
    words, payload = Buffer.zeros([1, 1, VOCAB // 32], DType.int32), Buffer.zeros([2], DType.int64)
    inputs, scratch = step.inputs(), Buffer.zeros([1, 1, VOCAB // 32], DType.int32)
    late = replace(
        inputs, pinned_bitmask=words, wait_payload=payload, device_bitmask_scratch=scratch
    )
    place = next(i for i, one in enumerate(inputs.buffers) if one is inputs.token_bitmask)
    expected = [*inputs.buffers[:place], words, payload, scratch, *inputs.buffers[place + 1 :]]
    assert len(late.buffers) == len(expected)
    assert all(found is wanted for found, wanted in zip(late.buffers, expected, strict=True))


@NAMES
def test_a_processor_does_not_wait_for_masks(step: Step) -> None:
    with pytest.raises(InputError, match="late_masks is set, but a CPU does not wait"):
        replace(step.model.arch_config, late_masks=True)


@NAMES
def test_inputs_that_the_graph_does_not_take_are_refused(step: Step) -> None:
    buffer = Buffer.zeros([2], DType.int64)
    for field in ("wait_payload", "device_bitmask_scratch", "draft_kv_blocks", "lora_ids"):
        value = [buffer] if field == "draft_kv_blocks" else buffer
        with pytest.raises(InputError, match=f"{field} is set"):
            step.model.execute(replace(step.inputs(), **{field: value}))
    with pytest.raises(InputError, match="draft_tokens is not set"):
        step.model.execute(replace(step.inputs(), draft_tokens=None))
    with pytest.raises(InputError, match="draft_kv_cache_buffers is set"):
        step.inputs(draft_kv_cache_buffers=[buffer])
    with pytest.raises(InputError, match="unheard_of is set"):
        step.inputs(unheard_of=1)


@NAMES
def test_drafts_of_the_caller_are_verified(step: Step) -> None:
    """The step after the first verifies what it is given; the right drafts are accepted."""
    step.begin()
    none, first = step.verify(-1, -1)
    assert none == 0
    one, second = step.verify(first, -1)
    assert one == 1
    assert step.verify(first, second)[0] == 2
    assert step.verify((first + 1) % VOCAB, second) == (0, first)
    with pytest.raises(InputError, match=r"draft_tokens has shape \[1, 3\].*\[1, 2\]"):
        step.verify(1, 2, 3)


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
