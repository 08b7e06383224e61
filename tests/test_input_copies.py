"""A step never reads its inputs before they are there.

On a CPU, MAX's copies return before they have copied, and graphs do not wait for them.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest
from max.driver import CPU, Buffer, batch_inplace_copy
from max.pipelines.context import SamplingParams, TextContext, TokenBuffer
from prompts import random_prompt

from unispec.engine import Engine
from unispec.pipelines.runtime.inputs import StepModelInputs

LENGTH = 40
SLOW = 1 << 25
"""Tokens in a copy that takes far longer than a step's start: 256 MiB."""


@pytest.fixture
def inputs(engine: Engine) -> Iterator[StepModelInputs]:
    """A prefill step of one row."""
    pipeline = engine.pipeline
    context = TextContext(
        max_length=2 * LENGTH,
        tokens=TokenBuffer(np.array(random_prompt(256, LENGTH, seed=1), np.int64)),
        sampling_params=SamplingParams(temperature=0),
    )
    manager = pipeline.kv_manager
    manager.claim(context)
    manager.alloc(context)
    cache = manager.runtime_inputs([[context]])
    yield pipeline.model.prepare_initial_token_inputs([[context]], cache)
    manager.release(context)
    pipeline.release(context.request_id)


def next_token(engine: Engine, inputs: StepModelInputs) -> int:
    return int(engine.pipeline.model.execute(inputs).next_tokens.to_numpy()[0])


def test_a_step_waits_for_a_copy_in_flight(engine: Engine, inputs: StepModelInputs) -> None:
    tokens = inputs.tokens.to_numpy().copy()
    expected = next_token(engine, inputs)
    late = Buffer.zeros([SLOW], inputs.tokens.dtype, CPU())
    view = late[SLOW - LENGTH :]
    assert next_token(engine, replace(inputs, tokens=view)) != expected  # zeros read otherwise
    source = np.zeros(SLOW, np.int64)
    source[-LENGTH:] = tokens
    batch_inplace_copy([late], [Buffer.from_numpy(source)])
    assert next_token(engine, replace(inputs, tokens=view)) == expected
