"""Process: one contender answers all prompts, one after the other."""

from __future__ import annotations

import resource
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from time import perf_counter
from typing import Protocol

from .answer import Answer
from .contenders import CONTENDERS, Contender
from .subprocesses import Json, serve_job

_WARM_UP_TOKENS = 8


class Runner(Protocol):
    """A loaded contender."""

    def generate(self, prompt: Sequence[int], max_new_tokens: int) -> Answer:
        """Answers one encoded prompt greedily."""


def _load(contender: Contender, model: Path, max_length: int, threads: int) -> Runner:
    """Imports only what this contender needs: an import is a part of its process time."""
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


def _work(job: Json) -> Json:
    start = perf_counter()
    runner = _load(
        CONTENDERS[job["contender"]], Path(job["model"]), job["max_length"], job["threads"]
    )
    runner.generate(job["warm_up_prompt"], _WARM_UP_TOKENS)
    load_s = perf_counter() - start
    answers = [runner.generate(prompt, job["max_new_tokens"]) for prompt in job["prompts"]]
    return {
        "load_s": load_s,
        "peak_rss_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "answers": [asdict(answer) for answer in answers],
    }


if __name__ == "__main__":
    serve_job(_work)
