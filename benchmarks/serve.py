"""Tokens per second over HTTP, against `unispec generate`'s engine and other servers.

Each contender answers the same prompts greedily, so many at a time, and takes turns with the
others; processes that are not measured are suspended. Of llama.cpp a server that speaks OpenAI's
interface can be named by its URL; start it with the same model on as many threads.
"""

# ruff: noqa: E402
from __future__ import annotations

from unispec.telemetry import turn_off_telemetry
from unispec.waiting import wait_asleep

turn_off_telemetry()
wait_asleep()  # before MAX is imported, whose threads would disturb the servers

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from statistics import median
from typing import Any

import click
import httpx
from max.pipelines.context import SamplingParams
from servers import wait_until_ready

from unispec.checkpoints.demo import demo_draft_folder, demo_model_folder, ensure_demo_model
from unispec.engine import Engine, EngineConfig, Request

TOPICS = (
    "why the sky is blue",
    "how a bicycle stays upright",
    "what makes bread rise",
    "how birds find their way",
    "why the sea is salty",
    "how a clock keeps time",
    "what a rainbow is",
    "how fish breathe",
)
MAX_LENGTH = 2048


@dataclass
class Measured:
    """One round of one contender."""

    tokens_per_second: float
    first_token_s: float


@dataclass
class Contender:
    """Something that answers prompts."""

    name: str
    answer: Callable[[Sequence[str], int], Measured]
    process: subprocess.Popen[bytes] | None = None
    found: dict[int, list[Measured]] = field(default_factory=dict)

    def measure(self, streams: int, new_tokens: int) -> None:
        """One round; its process runs during it only."""
        prompts = [f"Explain in simple terms {topic}." for topic in TOPICS[:streams]]
        self._send(signal.SIGCONT)
        result = self.answer(prompts, new_tokens)
        self._send(signal.SIGSTOP)
        self.found.setdefault(streams, []).append(result)

    def _send(self, number: signal.Signals) -> None:
        if self.process is not None:
            os.killpg(self.process.pid, number)


def in_process(model: str) -> Contender:
    """The engine of `unispec generate`, with the demo's EAGLE draft."""
    engine = Engine(
        EngineConfig(
            model=model,
            draft_model=str(demo_draft_folder("eagle3")),
            speculative_method="eagle3",
            num_speculative_tokens=1,
            max_batch_size=len(TOPICS),
            max_length=MAX_LENGTH,
        )
    )

    def answer(prompts: Sequence[str], new_tokens: int) -> Measured:
        engine.reset_prefix_cache()
        sampling = SamplingParams(temperature=0, max_new_tokens=new_tokens, ignore_eos=True)
        report = engine.generate(
            [
                Request(
                    token_ids=engine.tokenizer.apply_chat_template(
                        [{"role": "user", "content": prompt}],
                        add_generation_prompt=True,
                        return_dict=False,
                    ),
                    sampling=sampling,
                )
                for prompt in prompts
            ]
        )
        return Measured(report.tokens_per_second, report.time_to_first_token_s)

    return Contender("unispec generate", answer)


def over_http(name: str, url: str, process: subprocess.Popen[bytes] | None = None) -> Contender:
    """A server; what it answers is read as a stream, a connection for each prompt."""
    model = httpx.get(f"{url}/v1/models").json()["data"][0]["id"]

    def answer(prompts: Sequence[str], new_tokens: int) -> Measured:
        counts = [0] * len(prompts)
        firsts = [0.0] * len(prompts)
        begun = time.perf_counter()

        def read(at: int, prompt: str) -> None:
            body = {
                "model": model,
                "messages": [{"role": "user", "content": prompt}],
                "max_tokens": new_tokens,
                "temperature": 0,
                "ignore_eos": True,
                "stream": True,
                "stream_options": {"include_usage": True},
            }
            with httpx.stream(
                "POST", f"{url}/v1/chat/completions", json=body, timeout=600
            ) as lines:
                assert lines.status_code == 200, lines.read()
                for line in lines.iter_lines():
                    if not line.startswith("data: {"):
                        continue
                    event: dict[str, Any] = json.loads(line.removeprefix("data: "))
                    has_text = any(c["delta"].get("content") for c in event["choices"])
                    if has_text and not firsts[at]:
                        firsts[at] = time.perf_counter() - begun
                    if event.get("usage"):
                        counts[at] = event["usage"]["completion_tokens"]

        threads = [
            threading.Thread(target=read, args=(at, prompt)) for at, prompt in enumerate(prompts)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        wall = time.perf_counter() - begun
        # Some servers end at a token that they should ignore; what came is counted.
        assert all(counts), counts
        return Measured(sum(counts) / wall, median(firsts))

    return Contender(name, answer, process)


@contextmanager
def server(name: str, *command: str) -> Iterator[Contender]:
    """A server in a process group of its own, once it is ready."""
    with socket.socket() as free, socket.socket() as other:
        free.bind(("127.0.0.1", 0))
        other.bind(("127.0.0.1", 0))
        port, metrics_port = free.getsockname()[1], other.getsockname()[1]
    environment = {
        **os.environ,
        "MAX_SERVE_METRICS_ENDPOINT_PORT": str(metrics_port),
        "MAX_SERVE_LOGS_CONSOLE_LEVEL": "WARNING",
    }
    process = subprocess.Popen(
        [*command, "--port", str(port)],
        start_new_session=True,
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        url = f"http://127.0.0.1:{port}"
        wait_until_ready(process, url)
        yield over_http(name, url, process)
    finally:
        os.killpg(process.pid, signal.SIGCONT)
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


@click.command(help=__doc__, context_settings={"show_default": True})
@click.option("--rounds", type=click.IntRange(min=1), default=5, help="For each number of streams.")
@click.option("--new-tokens", type=click.IntRange(min=8), default=128, help="For each prompt.")
@click.option("--max-serve/--no-max-serve", default=True, help="Also MAX's own, target alone.")
@click.option("--llama-cpp", metavar="URL", help="Of a server that runs already.")
def main(rounds: int, new_tokens: int, max_serve: bool, llama_cpp: str | None) -> None:
    model = str(ensure_demo_model(demo_model_folder()))
    ours = [sys.executable, "-m", "unispec.cli", "serve", "--metrics-port", "0"]
    ours += ["--model", model, "--max-length", str(MAX_LENGTH)]
    draft = ["--draft-model-path", str(demo_draft_folder("eagle3"))]
    draft += ["--speculative-method", "eagle3", "--num-speculative-tokens", "1"]
    of_max = [os.path.join(os.path.dirname(sys.executable), "max"), "serve", "--model", model]
    of_max += ["--devices", "cpu", "--max-length", str(MAX_LENGTH), "--max-batch-size", "8"]
    of_max += ["--quantization-encoding", "float32", "--max-batch-input-tokens", "512"]
    with ExitStack() as running:
        contenders = [in_process(model)]
        contenders.append(running.enter_context(server("unispec serve, EAGLE K=1", *ours, *draft)))
        contenders.append(running.enter_context(server("unispec serve, target alone", *ours)))
        if max_serve:
            contenders.append(running.enter_context(server("max serve, target alone", *of_max)))
        if llama_cpp is not None:
            contenders.append(over_http("llama.cpp server, target alone", llama_cpp))
        for contender in contenders:
            contender.measure(1, 8)
        for contender in contenders:
            contender.found.clear()
        for streams in (1, 4, 8):
            for _ in range(rounds):
                for contender in contenders:
                    contender.measure(streams, new_tokens)
    report(contenders)


def report(contenders: Sequence[Contender]) -> None:
    print("| | 1 stream | 4 streams | 8 streams | first token, 1 / 8 |")
    print("| --- | --- | --- | --- | --- |")
    base = contenders[0].found
    for contender in contenders:
        cells = []
        for streams, rounds in contender.found.items():
            rate = median(one.tokens_per_second for one in rounds)
            share = rate / median(one.tokens_per_second for one in base[streams])
            cells.append(f"{rate:.1f} ({share:.2f})")
        firsts = [median(one.first_token_s for one in contender.found[count]) for count in (1, 8)]
        times = " / ".join(f"{first * 1e3:.0f} ms" for first in firsts)
        print(f"| {contender.name} | {' | '.join(cells)} | {times} |")


if __name__ == "__main__":
    main()
