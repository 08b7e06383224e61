"""Batches of replicas: joined to one, and each row moved on by its own tokens."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from deepseek_gpus import rows
from max.driver import CPU as CPUDevice
from max.driver import Buffer
from max.pipelines.context import TextContext
from max.pipelines.modeling.types import TextGenerationInputs

from unispec.errors import InputError
from unispec.pipelines.runtime.batch import BatchBuilder
from unispec.pipelines.runtime.outputs import StepModelOutputs
from unispec.pipelines.runtime.pipeline import SpeculativePipeline
from unispec.pipelines.targets.deepseek.inputs import DeepseekV3Inputs
from unispec.pipelines.targets.deepseek.model import DeepseekV3Model


class Replicated(DeepseekV3Model):
    """Two replicas without a graph, with two drafts and room for 9 tokens each."""

    def __init__(self) -> None:
        self.kv_params = SimpleNamespace(data_parallel_degree=2, page_size=128)
        self.devices: Any = [SimpleNamespace(is_host=False)] * 2
        self.signal_buffers: Any = ["s", "t"]
        self._connected: Any = SimpleNamespace(config=SimpleNamespace(max_tokens_per_rank=9))
        self.seen: list[TextContext] = []
        drafts = Buffer.from_numpy(np.full((3, 2), -1))
        names = ("tokens", "input_row_offsets", "return_n_logits", "draft_tokens")

        def fields(contexts: list[TextContext]) -> dict[str, Buffer]:
            self.seen = contexts
            return dict.fromkeys(names, drafts)

        self.batch: Any = SimpleNamespace(fields=fields)


def test_batches_of_replicas_become_one() -> None:
    model = Replicated()
    batches = [rows(3, 1), rows(7)]
    inputs = model.prepare_initial_token_inputs(batches)
    assert isinstance(inputs, DeepseekV3Inputs)
    assert [id(context) for context in model.seen] == [id(c) for batch in batches for c in batch]
    assert inputs.data_parallel_splits.to_numpy().tolist() == [0, 2, 3]
    assert inputs.host_input_row_offsets.to_numpy().tolist() == [0, 3, 4, 11]


class Answering(Replicated):
    """Its graph's outputs are given beforehand, a step's rows one after the other."""

    def __init__(self, *steps: tuple[list[int], list[int], list[list[int]]]) -> None:
        super().__init__()
        self._connected = None
        self.most_proposed = 2
        self._steps = iter(steps)
        self.inputs: list[DeepseekV3Inputs] = []
        self.batch = BatchBuilder(
            max_batch_size=4,
            max_batch_input_tokens=32,
            vocab_size=64,
            most_verified=2,
            num_speculative_tokens=2,
            device=CPUDevice(),
        )

    def execute(self, model_inputs: Any) -> StepModelOutputs:
        self.inputs.append(model_inputs)
        values = next(self._steps)
        outputs = [Buffer.from_numpy(np.array(value)) for value in values]
        nothing = Buffer.from_numpy(np.zeros(0))
        return StepModelOutputs(
            num_accepted_draft_tokens=outputs[0],
            next_tokens=outputs[1],
            next_draft_tokens=outputs[2],
            token_logprobs=nothing,
            top_tokens=nothing,
            top_logprobs=nothing,
            next_lengths=nothing,
            report=Buffer.from_numpy(
                np.concatenate([np.stack(values[:2], axis=1), values[2]], axis=1)
            ),
        )


def test_a_step_of_two_replicas_moves_each_row_on_by_its_own_tokens() -> None:
    model = Answering(
        ([0, 0, 0], [10, 20, 30], [[11, 12], [21, 22], [31, 32]]),
        ([2, 1], [23, 40], [[24, 25], [41, 42]]),
    )
    asked: list[Any] = []
    manager: Any = SimpleNamespace(runtime_inputs=asked.append, step=lambda context: None)
    pipeline = SpeculativePipeline(model, manager)
    first, second, third = rows(3, 1, 7)

    new = pipeline.execute(TextGenerationInputs(batches=[[first, second], [third]]))
    assert [new[one.request_id].tokens for one in (first, second, third)] == [[10], [20], [30]]
    pipeline.release(first.request_id)
    new = pipeline.execute(TextGenerationInputs(batches=[[second], [third]]))
    assert new[second.request_id].tokens == [21, 22, 23]
    assert new[third.request_id].tokens == [31, 40]

    assert asked == [[[first, second], [third]], [[second], [third]]]
    last = model.inputs[1]
    assert last.tokens.to_numpy().tolist() == [20, 30]
    assert last.draft_tokens is not None
    assert last.draft_tokens.to_numpy().tolist() == [[21, 22], [31, 32]]
    assert last.data_parallel_splits.to_numpy().tolist() == [0, 1, 2]
    assert model.batch.row(third).drafts == [41, 42]


def test_a_wrong_number_of_replicas_is_refused() -> None:
    message = "batches of 1 replicas were given; this graph has 2: give one for each"
    with pytest.raises(InputError, match=message):
        Replicated().prepare_initial_token_inputs([rows(3, 1, 7)])


def test_a_replica_gets_no_more_tokens_than_there_is_room_for() -> None:
    with pytest.raises(InputError, match=r"batch of replica 1 has 10 tokens, .* room for 9: give"):
        Replicated().prepare_initial_token_inputs([rows(3, 1), rows(8)])
