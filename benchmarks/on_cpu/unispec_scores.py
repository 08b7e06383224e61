"""Process: log probabilities that unispec gives to the tokens of a text."""

# ruff: noqa: E402
from __future__ import annotations

from unispec.waiting import wait_asleep

wait_asleep()  # before MAX is imported, as the command line does

import re
from collections.abc import Callable, Sequence

from generation.subprocesses import Json, serve
from max.pipelines.context import SamplingParams

from unispec.engine import Engine, EngineConfig, Request
from unispec.sampling.grammar import Grammar

_SPECIAL = re.compile(r"[\\.+*?()|\[\]{}^$]")
"""What a regex does not take as it is."""


def _score_all(engine: Engine, windows: Sequence[Sequence[int]]) -> list[list[float]]:
    """Of all tokens of each window but the first, after the ones before it.

    An engine says the log probabilities of what it writes, and those are of the model's own
    distribution, before any grammar. So a grammar that allows nothing but the text makes it
    write the text, all windows in one batch. There each mask allows one token, the canonical one;
    that they are the window's own is checked.
    """
    requests = [
        Request(
            token_ids=window[:1],
            sampling=SamplingParams(temperature=0, max_new_tokens=len(window) - 1, ignore_eos=True),
            grammar=_only(engine.tokenizer.decode(list(window[1:]))),
            logprobs=0,
        )
        for window in windows
    ]
    results = engine.generate(requests).results
    for window, result in zip(windows, results, strict=True):
        if result.token_ids != list(window[1:]):
            raise RuntimeError(f"unispec did not write the text that it was given: {result}"[:500])
    return [[token.logprob for token in result.logprobs] for result in results]


def _only(text: str | list[str]) -> Grammar:
    """A grammar that allows this text and nothing else."""
    assert isinstance(text, str)
    return Grammar("regex", _SPECIAL.sub(r"\\\g<0>", text))


def _serve(job: Json) -> tuple[Json, Callable[[Json], Json]]:
    engine = Engine(
        EngineConfig(
            model=job["file"],
            quantization_encoding=job["encoding"],
            max_length=job["max_length"],
            max_batch_size=job["rows"],
        )
    )
    return {"about": ""}, lambda request: {"logprobs": _score_all(engine, request["windows"])}


if __name__ == "__main__":
    serve(_serve)
