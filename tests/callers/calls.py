"""Requests of callers that share one engine, and what comes of them."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from max.pipelines.context import SamplingParams

from unispec.engine import Engine, Output, Request

__all__ = ["NEW_TOKENS", "answers", "finish", "in_threads", "request", "tokens_of"]

NEW_TOKENS = 12


def request(*tokens: int, new_tokens: int = NEW_TOKENS, **options: Any) -> Request:
    sampling = SamplingParams(temperature=0, max_new_tokens=new_tokens, **options)
    return Request(token_ids=tokens, sampling=sampling)


def answers(engine: Engine, *requests: Request, **callbacks: Any) -> list[list[int]]:
    return [list(result.token_ids) for result in engine.generate(requests, **callbacks).results]


def in_threads(*works: Callable[[], Any]) -> list[Any]:
    """What each returns; all begin at the same time."""
    together = threading.Barrier(len(works))

    def begin(work: Callable[[], Any]) -> Any:
        together.wait()
        return work()

    with ThreadPoolExecutor(len(works)) as pool:
        return list(pool.map(begin, works))


def finish(engine: Engine) -> dict[Any, list[Output]]:
    """Steps to the end; the outputs of each request."""
    outputs: dict[Any, list[Output]] = {}
    while engine.unfinished:
        for output in engine.step():
            outputs.setdefault(output.request_id, []).append(output)
    return outputs


def tokens_of(outputs: list[Output]) -> list[int]:
    return [token for output in outputs for token in output.token_ids]
