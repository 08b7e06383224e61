"""unispec as a contender."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from max.pipelines.context import SamplingParams

from unispec.engine import Engine, EngineConfig, Request, Step

from .job import Job
from .steps import Steps, Timed

__all__ = ["UnispecRunner"]

_PAGE = 128


class UnispecRunner:
    """One engine for all sizes of a batch."""

    def __init__(self, job: Job) -> None:
        self._engine = Engine(
            EngineConfig(
                model=job.target,
                draft_model=job.draft_folder,
                speculative_method=job.method,
                num_speculative_tokens=job.draft_tokens,
                synthetic_acceptance_rate=job.acceptance,
                devices=job.devices,
                max_length=job.max_length,
                max_batch_size=job.rows,
                max_batch_input_tokens=job.rows * job.context,
                # A page more a row, for drafts beyond the longest sequence.
                kv_cache_pages=job.rows * (job.max_length // _PAGE + 1),
                enable_prefix_caching=False,
                device_graph_capture=job.devices != "cpu",
            )
        )
        self._engine.load()

    def generate(self, prompts: Sequence[Sequence[int]], new_tokens: int) -> Timed:
        """Answers encoded prompts greedily."""
        steps = Steps(len(prompts))

        def ended(step: Step) -> None:
            steps.ended([len(row.token_ids) for row in step.rows])

        self._engine.on_step = ended
        greedy: dict[str, Any] = {
            "temperature": 0,
            "max_new_tokens": new_tokens,
            "ignore_eos": True,
        }
        # With one seed all rows would accept alike.
        self._engine.generate(
            [
                Request(token_ids=prompt, sampling=SamplingParams(seed=seed, **greedy))
                for seed, prompt in enumerate(prompts)
            ]
        )
        return steps.timed()
