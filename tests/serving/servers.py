"""A server of `unispec serve` in processes of its own, with a tiny pair."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import IO

import httpx
import openai
from tiny import TinyPair

__all__ = ["MODEL_NAME", "PRESET", "TEMPLATE", "Served", "ready_url", "serving", "start"]

PRESET = "llama_eagle_agreeing"
MODEL_NAME = "tiny"
TEMPLATE = (
    "{% for message in messages %}{{ message.role }}: {{ message.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)
START_SECONDS = 600
"""Room for a compile."""


class Served:
    """A running server.

    Args:
        process: of the command.
        lines: what it has written to stderr, which grows.
    """

    def __init__(self, process: subprocess.Popen[str], url: str, lines: list[str]) -> None:
        self.process = process
        self.url = url
        self.lines = lines
        self.http = httpx.Client(base_url=url, timeout=120)
        self.openai = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)

    def chat(self, content: str, **fields: object) -> httpx.Response:
        messages = [{"role": "user", "content": content}]
        return self.http.post("/v1/chat/completions", json={"messages": messages, **fields})

    def complete(self, prompt: object, **fields: object) -> httpx.Response:
        return self.http.post("/v1/completions", json={"prompt": prompt, **fields})


@contextmanager
def serving(pair: TinyPair, *options: str, **environment: str) -> Iterator[Served]:
    """A server until the block is left; it is ready when the block begins."""
    process, lines = start(pair, *options, **environment)
    try:
        yield Served(process, ready_url(process, lines), lines)
    finally:
        process.terminate()
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            process.kill()
            raise


def start(
    pair: TinyPair, *options: str, **environment: str
) -> tuple[subprocess.Popen[str], list[str]]:
    command = [
        sys.executable,
        *("-m", "unispec.cli", "serve", "--port", "0", "--metrics-port", "0"),
        *("--model", str(pair.target), "--served-model-name", MODEL_NAME, "--max-length", "512"),
        *("--draft-model-path", str(pair.draft), "--speculative-method", str(pair.method)),
        *("--num-speculative-tokens", "5", "--max-batch-input-tokens", "64", *options),
    ]
    process = subprocess.Popen(
        command, stderr=subprocess.PIPE, text=True, env={**os.environ, **environment}
    )
    lines: list[str] = []
    assert process.stderr is not None
    threading.Thread(target=collect, args=(process.stderr, lines), daemon=True).start()
    return process, lines


def collect(stream: IO[str], lines: list[str]) -> None:
    for line in stream:
        lines.append(line)


def ready_url(process: subprocess.Popen[str], lines: list[str]) -> str:
    """Where it answers, once it does."""
    pause = threading.Event()
    for _ in range(START_SECONDS * 10):
        for line in list(lines):
            if (found := re.search(r"interface\W+(https?://\S+)/v1", line)) is not None:
                return found[1]
        assert process.poll() is None, "".join(lines)
        pause.wait(0.1)
    raise TimeoutError("".join(lines))
