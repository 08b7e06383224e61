"""A ``Llama3Model`` driven without a pipeline: its graph, step by step, on ragged rows."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from max.driver import CPU, DeviceSpec
from max.engine import InferenceSession
from max.graph.weights import SafetensorWeights
from max.pipelines.context import SamplingParams, TextContext, TokenBuffer
from max.pipelines.lib import ModelOutputs, PipelineArgs, PipelineConfig

from unispec.kv_cache.manager import make_cache_manager
from unispec.pipelines.architectures.llama3_modulev3 import Llama3Inputs, Llama3Model

__all__ = ["MAX_LENGTH", "Driver", "pipeline_config"]

MAX_LENGTH = 96


def pipeline_config(folder: Path) -> PipelineConfig:
    """MAX's configuration of a checkpoint, sequences of up to ``MAX_LENGTH`` tokens."""
    return PipelineConfig.from_args(
        PipelineArgs(
            model_path=str(folder),
            max_length=MAX_LENGTH,
            device_specs=[DeviceSpec.cpu()],
            quantization_encoding="float32",
        )
    )


class Driver:
    """Up to 8 requests of a compiled model, and their pages.

    Args:
        folder: The checkpoint.
        model: The class under test.
        options: Of its constructor.
    """

    def __init__(self, folder: Path, model: type[Llama3Model] = Llama3Model, **options: Any):
        config = pipeline_config(folder)
        self.session = InferenceSession(devices=[CPU()])
        self.model = model(
            config,
            self.session,
            [CPU()],
            config.model.kv_cache,
            SafetensorWeights([folder / "model.safetensors"]),
            max_batch_size=8,
            **options,
        )
        self._manager = make_cache_manager(
            self.model.kv_params,
            num_pages=8,
            max_batch_size=8,
            draft_reads_next_token=False,
        )
        self.contexts: list[TextContext] = []

    def begin(self, prompts: Sequence[Sequence[int]]) -> None:
        """Replaces all requests by new ones with these prompts."""
        for context in self.contexts:
            self._manager.release(context)
        self._manager.reset_prefix_cache()
        self.contexts = [
            TextContext(
                max_length=MAX_LENGTH,
                tokens=TokenBuffer(np.array(prompt, np.int64)),
                sampling_params=SamplingParams(temperature=0),
            )
            for prompt in prompts
        ]
        for context in self.contexts:
            self._manager.claim(context)

    def step(self, **options: Any) -> tuple[Llama3Inputs, ModelOutputs]:
        """Runs the tokens of every request that are not in the cache yet."""
        for context in self.contexts:
            self._manager.alloc(context)
        cache = self._manager.runtime_inputs([self.contexts])
        inputs = self.model.prepare_initial_token_inputs([self.contexts], cache, **options)
        return inputs, self.model.execute(inputs)

    def append(self, tokens: Sequence[int]) -> None:
        """Gives each request its next token."""
        for context, token in zip(self.contexts, tokens, strict=True):
            context.advance_token_buffer(token)
            self._manager.step(context)
