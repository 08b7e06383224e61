"""How tests load and ask an engine, or a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import cycle
from typing import NamedTuple

from max.pipelines.context import SamplingParams, TextContext, TextGenerationOutput
from max.pipelines.modeling.types import TextGenerationInputs
from max.pipelines.request import RequestID
from tiny import NEAR_DELTA, NEAR_TOP_N, TinyPair

from unispec.engine import Engine, EngineConfig, Request, Step

__all__ = [
    "MAX_LENGTH",
    "Deferring",
    "answers",
    "assert_left_empty",
    "greedy_requests",
    "load_tiny",
    "observing",
    "proposing",
    "run_python",
    "scheduled",
    "tiny_config",
]

MAX_LENGTH = 512
"""Of the tiny engines; short enough that requests reach it."""

PROPOSED = 5
"""Tokens that a tiny engine proposes where a test does not say how many."""


def tiny_config(pair: TinyPair) -> EngineConfig:
    """Up to 12 rows, chunks of 64 tokens; K up to 8, or a block's."""
    return EngineConfig(
        model=str(pair.target),
        draft_model=None if pair.draft is None else str(pair.draft),
        speculative_method=pair.method,
        draft_proposal=pair.draft_proposal,
        use_relaxed_acceptance_for_thinking=pair.relaxed,
        relaxed_topk=NEAR_TOP_N,
        relaxed_delta=NEAR_DELTA,
        num_speculative_tokens=None if pair.method == "dflash" else 8,
        prompt_lookup_max=0,
        max_batch_size=12,
        max_batch_input_tokens=64,
        max_length=MAX_LENGTH,
    )


def load_tiny(pair: TinyPair) -> Engine:
    """An engine of `tiny_config`, which proposes `PROPOSED` tokens at first."""
    engine = Engine(tiny_config(pair))
    engine.num_speculative_tokens = PROPOSED
    return engine


def greedy_requests(
    prompts: Sequence[Sequence[int]], max_new_tokens: int, *, ignore_eos: bool = False
) -> list[Request]:
    """Requests for the most probable continuation."""
    sampling = SamplingParams(temperature=0, max_new_tokens=max_new_tokens, ignore_eos=ignore_eos)
    return [Request(token_ids=prompt, sampling=sampling) for prompt in prompts]


def answers(
    engine: Engine, requests: Sequence[Request], batch_size: int | None = None
) -> list[list[int]]:
    """The tokens of each answer, ``batch_size`` requests a run, from an empty prefix cache."""
    engine.reset_prefix_cache()
    size = batch_size or len(requests)
    return [
        result.token_ids
        for start in range(0, len(requests), size)
        for result in engine.generate(requests[start : start + size]).results
    ]


@contextmanager
def proposing(engine: Engine, k: int) -> Iterator[None]:
    """Lets the engine's graph propose ``k`` tokens a step, up to what it was loaded with."""
    before = engine.num_speculative_tokens
    engine.num_speculative_tokens = k
    try:
        yield
    finally:
        engine.num_speculative_tokens = before


class Deferring(NamedTuple):
    """A step, just before it runs."""

    wanted: int
    """How many tokens it was told to propose."""
    drafts: list[int]
    """Of each row, how many it verifies."""
    deferred: list[int]
    """Of each row, how many positions the draft has not read."""


@contextmanager
def scheduled(
    engine: Engine,
    counts: Sequence[int],
    before: Callable[[Sequence[TextContext]], None] = lambda contexts: None,
) -> Iterator[list[Deferring]]:
    """Lets each step propose as many tokens as the next of ``counts``, in a circle; 0 is allowed.

    Yields what each step began with. ``before`` is called first and may give rows other drafts.
    """
    engine.load()
    pipeline, steps, following = engine.pipeline, [], cycle(counts)
    execute, batch = pipeline.execute, pipeline.model.batch
    speculation = pipeline.speculation

    def run(inputs: TextGenerationInputs[TextContext]) -> dict[RequestID, TextGenerationOutput]:
        before(inputs.flat_batch)
        batch.num_speculative_tokens = next(following)
        rows = [batch.row(context) for context in inputs.flat_batch]
        steps.append(
            Deferring(
                batch.num_speculative_tokens,
                [len(row.drafts) for row in rows],
                [len(row.deferred) for row in rows],
            )
        )
        return execute(inputs)

    pipeline.execute = run  # type: ignore[method-assign]
    # It would choose for itself.
    pipeline.speculation = None
    try:
        yield steps
    finally:
        pipeline.execute = execute  # type: ignore[method-assign]
        pipeline.speculation = speculation


@contextmanager
def observing(engine: Engine, hook: Callable[[Step], None]) -> Iterator[None]:
    """Gives each step of the engine to ``hook``."""
    engine.on_step = hook
    try:
        yield
    finally:
        engine.on_step = None


def assert_left_empty(engine: Engine) -> None:
    """No request and no page that one holds; pages of earlier prompts are free, too."""
    engine.reset_prefix_cache()
    assert (engine.num_requests, engine.unfinished) == (0, 0)
    assert engine.num_free_pages == engine.num_pages


def run_python(code: str, *arguments: str) -> str:
    """The last line that the code prints; it must not fail."""
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments],
        # Importing MAX changes what a child inherits where it is not given.
        env=dict(os.environ),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()[-1]
