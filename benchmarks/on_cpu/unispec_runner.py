"""unispec as a contender: with a packaged draft, or the target alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from max.pipelines.context import SamplingParams

from unispec.checkpoints.demo import demo_draft_folder
from unispec.engine import Engine, EngineConfig, Request, Step
from unispec.methods import Method

from .answer import Answer, Arrivals

__all__ = ["UnispecJob", "UnispecRunner"]


@dataclass(frozen=True, kw_only=True)
class UnispecJob:
    """What to load, and how it runs."""

    file: str
    encoding: str
    threads: int
    rows: int
    max_length: int
    method: Method | None = None
    draft_tokens: int = 0


class UnispecRunner:
    """Generates with one engine for all sizes of a batch."""

    def __init__(self, job: UnispecJob) -> None:
        config = EngineConfig(
            model=job.file,
            quantization_encoding=job.encoding,
            max_length=job.max_length,
            max_batch_size=job.rows,
        )
        if job.method is not None:
            config = replace(
                config,
                draft_model=str(demo_draft_folder(job.method)),
                speculative_method=job.method,
                num_speculative_tokens=job.draft_tokens,
            )
        self._engine = Engine(config)
        self._engine.on_step = self._tick
        self._engine.load()
        self._arrivals = Arrivals()
        self._rows: dict[object, int] = {}

    def generate(self, prompts: Sequence[Sequence[int]], max_new_tokens: int) -> Answer:
        """Answers encoded prompts greedily."""
        self._engine.reset_prefix_cache()
        self._rows = {}
        sampling = SamplingParams(temperature=0, max_new_tokens=max_new_tokens)
        requests = [Request(token_ids=prompt, sampling=sampling) for prompt in prompts]
        self._arrivals.start(len(prompts))
        report = self._engine.generate(requests)
        return self._arrivals.answer(
            [result.token_ids for result in report.results], report.mean_acceptance_length
        )

    def _tick(self, step: Step) -> None:
        for row in step.rows:
            index = self._rows.setdefault(row.context.request_id, len(self._rows))
            self._arrivals.tick(index, len(row.token_ids))
