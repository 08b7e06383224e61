"""Process: one contender, loaded once, answers a prompt whenever it is asked."""

from __future__ import annotations

import resource
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Protocol

from unispec.waiting import wait_asleep

from .answer import Answer
from .contenders import CONTENDERS, Contender
from .subprocesses import Json, serve

_WARM_UP_TOKENS = 8


class Runner(Protocol):
    """A loaded contender."""

    def generate(self, prompt: Sequence[int], max_new_tokens: int) -> Answer:
        """Answers one encoded prompt greedily."""


def _load(contender: Contender, model: Path, max_length: int, threads: int) -> Runner:
    """Imports only what this contender needs: an import is a part of its process time."""
    if contender.waits_asleep or contender.system == "unispec":
        wait_asleep()
    if contender.system == "unispec":
        from .ours import UnispecRunner

        return UnispecRunner(model, contender.method, contender.draft_tokens, max_length)
    if contender.system == "max":
        from .max_pipeline import MaxRunner

        return MaxRunner(model, max_length)
    import torch

    from .hugging_face import TransformersRunner

    torch.set_num_threads(threads)
    return TransformersRunner(model, contender.draft_tokens)


def _serve(job: Json) -> tuple[Json, Callable[[Json], Json]]:
    runner = _load(
        CONTENDERS[job["contender"]], Path(job["model"]), job["max_length"], job["threads"]
    )
    runner.generate(job["warm_up_prompt"], _WARM_UP_TOKENS)

    def answer(request: Json) -> Json:
        return asdict(runner.generate(request["prompt"], request["max_new_tokens"]))

    return {"peak_rss_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024}, answer


if __name__ == "__main__":
    serve(_serve)
