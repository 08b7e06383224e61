"""unispec as a contender: fused, or the target alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from max.pipelines.context import SamplingParams

from unispec.checkpoints.demo import demo_draft_folder
from unispec.engine import Engine, EngineConfig, Report, Request
from unispec.methods import Method

from .answer import Answer, StepClock

__all__ = ["OurEngine", "UnispecRunner"]


class OurEngine:
    """An engine that tells when each of its steps ends.

    Args:
        model: the target's folder.
        method: of the draft; None runs the target alone.
        draft_tokens: K.
        max_length: longest sequence, in tokens.
        on_step: gets the number of tokens that a step brought.
    """

    def __init__(
        self,
        model: Path,
        method: Method | None,
        draft_tokens: int,
        max_length: int,
        on_step: Callable[[int], None],
    ) -> None:
        config = EngineConfig(model=str(model), max_length=max_length)
        if method is not None:
            config = replace(
                config,
                draft_model=str(demo_draft_folder(method)),
                speculative_method=method,
                num_speculative_tokens=draft_tokens,
            )
        self._engine = Engine(config)
        self._engine.on_step = lambda step: on_step(sum(len(row.token_ids) for row in step.rows))

    def generate(
        self, prompt: Sequence[int], max_new_tokens: int, *, ignore_eos: bool = False
    ) -> Report:
        """Answers one encoded prompt greedily."""
        sampling = SamplingParams(
            temperature=0, max_new_tokens=max_new_tokens, ignore_eos=ignore_eos
        )
        return self._engine.generate([Request(token_ids=prompt, sampling=sampling)])


class UnispecRunner:
    """Generates with unispec; see `OurEngine` for the arguments."""

    def __init__(
        self, model: Path, method: Method | None, draft_tokens: int, max_length: int
    ) -> None:
        self._clock = StepClock()
        self._ours = OurEngine(model, method, draft_tokens, max_length, self._clock.tick)

    def generate(self, prompt: Sequence[int], max_new_tokens: int) -> Answer:
        """Answers one encoded prompt greedily."""
        self._clock.start()
        report = self._ours.generate(prompt, max_new_tokens)
        return self._clock.answer(
            report.results[0].token_ids,
            mean_acceptance_length=report.mean_acceptance_length,
            graph_times_s=[step.graph_s for step in report.decode_steps],
        )
