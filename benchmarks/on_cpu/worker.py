"""Process: unispec, MAX's own pipeline or transformers, loaded once, answers when it is asked."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Protocol

from generation.subprocesses import Json, serve

from unispec.waiting import wait_asleep

from .answer import Answer


class Runner(Protocol):
    """A loaded contender."""

    def generate(self, prompts: Sequence[Sequence[int]], max_new_tokens: int) -> Answer:
        """Answers encoded prompts greedily."""


def _load(system: str, job: Json) -> Runner:
    """Imports only what this contender needs."""
    if system == "unispec":
        wait_asleep()  # as its command line does
        from .unispec_runner import UnispecJob, UnispecRunner

        return UnispecRunner(UnispecJob(**job))
    if system == "max":
        from .max_runner import MaxRunner

        return MaxRunner(job["file"], job["rows"], job["max_length"])
    from .transformers_runner import TransformersRunner

    return TransformersRunner(job["file"], job["encoding"], job["threads"])


def _serve(job: Json) -> tuple[Json, Callable[[Json], Json]]:
    runner = _load(job.pop("system"), job)

    def answer(request: Json) -> Json:
        return asdict(runner.generate(request["prompts"], request["max_new_tokens"]))

    return {"about": ""}, answer


if __name__ == "__main__":
    serve(_serve)
