"""What a llama.cpp server is asked; imports the standard library only."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from http.client import HTTPConnection, HTTPResponse
from time import perf_counter
from typing import Any

from .answer import Answer, Arrivals

__all__ = ["complete", "score_all"]

Json = dict[str, Any]
_DATA = b"data: {"


def complete(host: str, prompts: Sequence[Sequence[int]], max_new_tokens: int) -> Answer:
    """Greedy answers to all prompts at once.

    One prompt is timed by the server's own clock, which leaves out what answering over HTTP
    costs. Of several, the tokens are timed as they arrive, for its clock does not say which of
    them the server computed at a time.
    """
    request = {
        "prompt": list(map(list, prompts)),
        "n_predict": max_new_tokens,
        "temperature": 0,
        "cache_prompt": False,
        "return_tokens": True,
    }
    if len(prompts) == 1:
        return _at_once(host, {**request, "prompt": list(prompts[0])})
    return _streamed(host, request, len(prompts))


def score_all(host: str, windows: Sequence[Sequence[int]]) -> list[list[float]]:
    """Log probabilities of all tokens of each window but the first, after the ones before it.

    A grammar that allows nothing else makes the server write these tokens; what it says of
    their probability is taken from the logits before the grammar.
    """
    with ThreadPoolExecutor(len(windows)) as pool:
        return list(pool.map(partial(_score, host), windows))


def _score(host: str, window: Sequence[int]) -> list[float]:
    first, *rest = window
    request = {
        "prompt": [first],
        "n_predict": len(rest),
        "temperature": 0,
        "cache_prompt": False,
        "return_tokens": True,
        "n_probs": 1,
        # llguidance's language. llama.cpp's own takes 12 times as long for 127 tokens, and grows.
        "grammar": "%llguidance {}\nstart: " + " ".join(f"<[{token}]>" for token in rest),
    }
    with _post(host, request) as response:
        result: Json = json.loads(response.read())
    if result.get("tokens") != rest:
        raise RuntimeError(f"llama.cpp did not write the text that it was given: {result}"[:500])
    return [float(token["logprob"]) for token in result["completion_probabilities"]]


def _at_once(host: str, request: Json) -> Answer:
    with _post(host, request) as response:
        result: Json = json.loads(response.read())
    times = result["timings"]
    decoded = int(times["predicted_n"]) - 1
    return Answer(
        token_ids=[result["tokens"]],
        first_token_s=times["prompt_ms"] / 1000,
        decode_s=times["predicted_ms"] / 1000,
        decode_tokens=decoded,
        acceptance_length=_acceptance_length([times]),
    )


def _streamed(host: str, request: Json, rows: int) -> Answer:
    arrivals = Arrivals()
    arrivals.start(rows)
    with _post(host, {**request, "stream": True}) as response:
        # What has arrived is read when nothing more is computed.
        lines = [(perf_counter(), line) for line in response if line.startswith(_DATA)]
    token_ids: list[list[int]] = [[] for _ in range(rows)]
    timings = []
    for at, line in lines:
        event: Json = json.loads(line.removeprefix(b"data: "))
        if event["stop"]:
            timings.append(event["timings"])
            continue
        arrivals.tick(event["index"], len(event["tokens"]), at)
        token_ids[event["index"]] += event["tokens"]
    return arrivals.answer(token_ids, _acceptance_length(timings))


def _acceptance_length(timings: Sequence[Json]) -> float:
    """Of the tokens after the first: all of them over those that were not proposed before."""
    decoded = sum(times["predicted_n"] - 1 for times in timings)
    accepted = sum(times.get("draft_n_accepted", 0) for times in timings)
    return decoded / (decoded - accepted) if decoded else 1.0


@contextmanager
def _post(host: str, request: Json) -> Iterator[HTTPResponse]:
    connection = HTTPConnection(host)
    try:
        connection.request(
            "POST", "/completion", json.dumps(request), {"Content-Type": "application/json"}
        )
        response = connection.getresponse()
        if response.status != 200:
            raise RuntimeError(f"llama.cpp answers {response.status}: {response.read()[:500]!r}")
        yield response
    finally:
        connection.close()
