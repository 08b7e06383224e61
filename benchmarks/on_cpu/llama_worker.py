"""Process: llama.cpp, in an interpreter that need not have unispec."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict

from generation.subprocesses import Json, serve

from .llama_http import complete, score_all
from .llama_server import LlamaJob, start_server


def _serve(job: Json) -> tuple[Json, Callable[[Json], Json]]:
    server = start_server(LlamaJob(**job))

    def answer(request: Json) -> Json:
        if "windows" in request:
            return {"logprobs": score_all(server.host, request["windows"])}
        return asdict(complete(server.host, request["prompts"], request["max_new_tokens"]))

    return {"about": server.about}, answer


if __name__ == "__main__":
    serve(_serve)
