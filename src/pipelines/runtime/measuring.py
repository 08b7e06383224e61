"""Measures what steps cost on this machine, with requests that nobody asked."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from math import inf
from time import perf_counter
from typing import Final

import numpy as np
import numpy.typing as npt
from max.pipelines.context import SamplingParams, TextContext

from unispec.kv_cache.manager import pages_per_row
from unispec.pipelines.policy.costs import StepCost, StepCosts

from .contexts import make_context
from .pipeline import SpeculativePipeline
from .prompts import Prompt

__all__ = ["measure_step_costs"]

# Lengths of sequences, in tokens; others are on the line through both. They end in the middle of a
# page of 128 tokens, so that no draft has to read because a page is full.
_SHORT: Final = 64
_LONG: Final = 1984
# Widths that are measured; those between are on the line between.
_WIDTHS: Final = (0, 1, 2, 3, 5, 8, 12, 16, 24, 31)
# The fastest of several steps counts: what disturbs one only makes it slower. There are at least
# so many, and more in so many seconds, up to the last number; but one that is slow is enough.
_LEAST_STEPS, _SECONDS, _MOST_STEPS = 3, 0.05, 10
_SLOW_S: Final = 0.25
# A table is another machine's, or of another moment's, if a draft's price is so far from it.
_TOLERANCE: Final = 0.1


def measure_step_costs(
    pipeline: SpeculativePipeline, *, num_pages: int, max_length: int, vocab_size: int
) -> StepCosts:
    """Runs steps of all kinds and takes their times; the caches keep nothing of them.

    No request may be running. Batches of 1, 2, 4, ... rows are measured up to `max_batch_size`,
    with short and with long sequences, as far as the pages go.

    Args:
        num_pages: of the caches.
        max_length: longest sequence, in tokens.
        vocab_size: V.
    """
    params, short = pipeline.model.kv_params, _short(max_length)
    sizes = [
        rows
        for rows in _doubling(pipeline.max_batch_size)
        if rows == 1 or rows * pages_per_row(params, short + 1) <= num_pages
    ]
    room = num_pages // sizes[-1] * params.page_size - 2 * params.num_draft_tokens - 2
    pages = max(min(max_length - 1, room) - short, 0) // params.page_size
    long = min(_LONG, short + pages * params.page_size)
    measured: dict[tuple[int, int], StepCost] = {}
    draw = np.random.default_rng(0)
    for rows in sizes:
        for length in sorted({short, long}):
            prompts = draw.integers(0, vocab_size, (rows, length))
            with _running(pipeline, prompts, max_length, vocab_size) as contexts:
                measured[rows, length] = _measure(_Stopwatch(pipeline, contexts, draw))
    return StepCosts(measured)


def still_hold(
    costs: StepCosts, pipeline: SpeculativePipeline, *, max_length: int, vocab_size: int
) -> bool:
    """Whether steps with a draft take as many times as long as one without as they did.

    Args:
        costs: of such steps, measured some time ago.
        pipeline: no request of it may be running.
        max_length: longest sequence, in tokens.
        vocab_size: V.
    """
    draw, short = np.random.default_rng(0), _short(max_length)
    prompts = draw.integers(0, vocab_size, (1, short))
    with _running(pipeline, prompts, max_length, vocab_size) as contexts:
        seconds = _Stopwatch(pipeline, contexts, draw)
        proposals = min(1, pipeline.model.most_proposed)
        seconds((1, proposals))  # what is run for the first time takes longer
        alone, verifying, both = seconds((0, 0), (1, 0), (1, proposals))
    cost = costs.at(1, short)
    pairs = (
        (verifying / alone, cost.verify[1] / cost.verify[0]),
        (both / alone, (cost.verify[1] + cost.propose[proposals]) / cost.verify[0]),
    )
    return all(bool(abs(now - then) <= _TOLERANCE * then) for now, then in pairs)


def _short(max_length: int) -> int:
    return min(_SHORT, max_length - 1)


def _doubling(most: int) -> list[int]:
    """1, 2, 4, ... and the last one."""
    sizes = [1]
    while sizes[-1] < most:
        sizes.append(min(2 * sizes[-1], most))
    return sizes


@contextmanager
def _running(
    pipeline: SpeculativePipeline,
    prompts: npt.NDArray[np.int64],
    max_length: int,
    vocab_size: int,
) -> Iterator[list[TextContext]]:
    """Requests that have pages, each with one token that is not in the caches yet."""
    manager = pipeline.kv_manager
    contexts = [
        make_context(
            Prompt(prompt.tolist()),
            SamplingParams(max_new_tokens=1),
            name="a measured prompt",
            max_length=max_length,
            vocab_size=vocab_size,
            eos_token_ids=frozenset(),
            has_grammar=False,
        )
        for prompt in prompts
    ]
    try:
        for context in contexts:
            manager.claim(context)
            manager.alloc(context)
            context.tokens.skip_processing(context.tokens.active_length - 1)
            # A row whose prompt was read: the draft need not read it in a step.
            pipeline.model.batch.row(context).generated = 1
        yield contexts
    finally:
        for context in contexts:
            if manager.contains(context):
                manager.release(context)
            pipeline.model.batch.rows.pop(context.request_id, None)


class _Stopwatch:
    """Times steps with some requests."""

    def __init__(
        self,
        pipeline: SpeculativePipeline,
        contexts: Sequence[TextContext],
        draw: np.random.Generator,
    ) -> None:
        self.pipeline = pipeline
        self._contexts = contexts
        self._draw = draw

    def __call__(self, *kinds: tuple[int, int]) -> list[float]:
        """Seconds of each kind of step; they take turns, so that a busy moment slows all alike.

        Args:
            kinds: how many tokens a row are verified, and proposed.
        """
        fastest, rounds, spent = [inf] * len(kinds), 0, 0.0
        while spent < _SLOW_S and (
            rounds < _LEAST_STEPS or (rounds < _MOST_STEPS and spent < _SECONDS)
        ):
            times = [self._one(*kind) for kind in kinds]
            fastest = list(map(min, fastest, times))
            rounds, spent = rounds + 1, spent + max(times)
        return fastest

    def _one(self, width: int, proposals: int) -> float:
        batch = self.pipeline.model.batch
        batch.num_speculative_tokens = proposals
        for context in self._contexts:
            tokens = self._draw.choice(context.tokens.all, width)
            batch.row(context).drafts = tokens.tolist()
        start = perf_counter()
        self.pipeline.launch([self._contexts], width).reading.wait()
        return perf_counter() - start


def _measure(seconds: _Stopwatch) -> StepCost:
    """The cost of steps with these requests."""
    model = seconds.pipeline.model
    widest, most = model.kv_params.num_draft_tokens, model.most_proposed

    seconds((0, most))  # what is run for the first time takes longer
    widths, verify = [0], seconds((0, 0))
    for width in [*(each for each in _WIDTHS if 0 < each < widest), widest]:
        # Drafts that cost more than the tokens they could bring are never worth it.
        if width > widths[-1] and verify[-1] <= (widths[-1] + 1) * verify[0]:
            widths.append(width)
            verify += seconds((width, 0))
    wide = np.arange(widest + 1)
    times = np.interp(wide, widths, verify)
    times[widths[-1] :] = verify[-1] * (wide[widths[-1] :] + 1) / (widths[-1] + 1)
    propose = np.zeros(most + 1)
    if most:
        # Beside a verified draft, as proposals mostly are.
        none, one, all_of_them = seconds((1, 0), (1, 1), (1, most))
        first = max(one - none, 0.0)
        propose[1:] = np.linspace(first, max(all_of_them - none, first), most)
    return StepCost(times, propose)
