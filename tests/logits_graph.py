"""The logits of several targets from one graph, so that their kernels are compiled once."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from max import tree
from max.driver import CPU, Buffer
from max.dtype import DType
from max.engine import InferenceSession
from max.graph import DeviceRef, Graph, TensorType
from max.nn import Module
from max.pipelines.context import SamplingParams, TextContext, TokenBuffer
from prompts import random_prompt
from reference.target import TargetReference
from runs import MAX_LENGTH

from unispec.kernels.library import kernels_for
from unispec.kv_cache.manager import make_cache_manager
from unispec.kv_cache.views import take_caches
from unispec.pipelines.unified.weights import load_weights

__all__ = ["LogitsGraph", "Stack", "assert_logits", "compile_logits"]

LENGTHS = (5, 40, 17, 1)
"""Of the prompts of a ragged batch."""
MORE = (7, 77, 177, 27)
"""A token after each prompt, which reads the cache."""
TOLERANCE = 1e-4
"""Largest error, relative to the largest value of the reference."""


class Stack(NamedTuple):
    """A target without its checkpoint."""

    config: Any
    module: Module
    weights: Mapping[str, Any]
    """By name, as the module has them."""


class _Stacks(Module):
    """Targets side by side."""

    def __init__(self, stacks: Mapping[str, Stack]) -> None:
        super().__init__()
        self.stacks = stacks
        for name, stack in stacks.items():
            setattr(self, name, stack.module)

    def __call__(self, tokens: Any, offsets: Any, inputs: Any) -> list[Any]:
        outputs = []
        for name, stack in self.stacks.items():
            (cache,) = take_caches(stack.config.kv_params, inputs)
            module: Any = getattr(self, name)
            hidden, _ = module(tokens, offsets, cache)
            outputs.append(module.logits(hidden))
        return outputs


@dataclass(frozen=True)
class LogitsGraph:
    """The compiled graph, and a cache manager for each target."""

    model: Any
    managers: Mapping[str, Any]
    weights: Mapping[str, Any]
    """On a CPU the compiled graph reads them where they lie and does not own them."""


def compile_logits(name: str, stacks: Mapping[str, Stack]) -> LogitsGraph:
    """Compiles all targets in one graph of this name."""
    session = InferenceSession(devices=[CPU()])
    module = _Stacks(stacks)
    load_weights(
        module,
        {
            f"{prefix}.{key}": tensor
            for prefix, stack in stacks.items()
            for key, tensor in stack.weights.items()
        },
    )
    params = [stack.config.kv_params for stack in stacks.values()]
    cpu = DeviceRef.CPU()
    types = [
        TensorType(DType.int64, ["num_tokens"], device=cpu),
        TensorType(DType.uint32, ["num_row_offsets"], device=cpu),
        *(leaf for one in params for leaf in tree.leaves(one.get_symbolic_inputs())),
    ]
    with kernels_for(cpu), Graph(name, input_types=types) as graph:
        inputs = iter(graph.inputs)
        tokens, offsets = next(inputs).tensor, next(inputs).tensor
        graph.output(*module(tokens, offsets, inputs))
    managers = {
        key: make_cache_manager(
            stack.config.kv_params,
            num_pages=8,
            max_batch_size=8,
            draft_reads_next_token=False,
        )
        for key, stack in stacks.items()
    }
    weights = module.state_dict()
    return LogitsGraph(session.load(graph, weights_registry=weights), managers, weights)


def assert_logits(graph: LogitsGraph, targets: Mapping[str, TargetReference]) -> None:
    """A ragged batch of prompts, then one more token a row, which reads the cache."""
    prompts = [random_prompt(256, length, seed=length) for length in LENGTHS]
    batches = {name: [_context(prompt) for prompt in prompts] for name in graph.managers}
    for name, manager in graph.managers.items():
        for one in batches[name]:
            manager.claim(one)
    expected = {
        name: [
            targets[name].features_and_logits([*prompt, token])[1].numpy()
            for prompt, token in zip(prompts, MORE, strict=True)
        ]
        for name in graph.managers
    }
    for step in range(2):
        caches = []
        for name, manager in graph.managers.items():
            for one in batches[name]:
                manager.alloc(one)
            caches.append(manager.runtime_inputs([batches[name]]))
        active = [one.tokens.active.tolist() for one in next(iter(batches.values()))]
        offsets = np.cumsum([0, *map(len, active)]).astype(np.uint32)
        outputs = graph.model.execute(
            Buffer.from_numpy(np.concatenate(active)),
            Buffer.from_numpy(offsets),
            *tree.leaves(caches),
        )
        for name, output in zip(graph.managers, outputs, strict=True):
            ours = np.split(output.to_numpy(), offsets[1:-1])
            for row, logits in enumerate(ours):
                theirs = expected[name][row]
                theirs = theirs[:-1] if step == 0 else theirs[-1:]
                assert logits.shape == theirs.shape
                error = float(np.abs(logits - theirs).max() / np.abs(theirs).max())
                assert error < TOLERANCE, f"{name}, row {row}, step {step}: {error:.1e}"
        for name, manager in graph.managers.items():
            for one, token in zip(batches[name], MORE, strict=True):
                one.advance_token_buffer(token)
                manager.step(one)


def _context(prompt: list[int]) -> TextContext:
    return TextContext(
        max_length=MAX_LENGTH,
        tokens=TokenBuffer(np.array(prompt, np.int64)),
        sampling_params=SamplingParams(temperature=0),
    )
