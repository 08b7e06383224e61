"""Process: one contender, loaded once, answers a batch of each size."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Protocol

import numpy as np
from generation.subprocesses import Json, serve

from .job import Job
from .steps import Timed


class Runner(Protocol):
    """A loaded contender."""

    def generate(self, prompts: Sequence[Sequence[int]], new_tokens: int) -> Timed:
        """Answers encoded prompts greedily."""


def load(system: str, job: Job) -> Runner:
    """Imports only what this contender needs."""
    if system == "unispec":
        from .unispec_runner import UnispecRunner

        return UnispecRunner(job)
    from .max_runner import MaxRunner

    return MaxRunner(job)


def measure(request: Json) -> Json:
    """The steps of each size of a batch, by its rows as a text.

    Args:
        request: `system`, a `job`, and `batches`, `new_tokens` and `vocabulary`.
    """
    job = Job(**request["job"])
    runner = load(request["system"], job)
    random = np.random.default_rng(0)
    found = {}
    for rows in request["batches"]:
        for _ in range(2):  # the first time warms up
            prompts = random.integers(0, request["vocabulary"], (rows, job.context)).tolist()
            timed = runner.generate(prompts, request["new_tokens"])
        found[str(rows)] = asdict(timed)
    return found


if __name__ == "__main__":
    serve(lambda request: (measure(request), None))
