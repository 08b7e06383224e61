"""Ask replicas many things while they are killed, and count what became of each request.

Every prompt is answered alone first; then requests come at random times, some clients leave, and
replicas on this machine are killed with SIGKILL: in turns the process of Ray Serve and that of
`unispec serve`. An answer is compared with the one that came alone: sampled ones have a seed.

    python examples/ray_serve/load.py --requests 4000 --minutes 10 --kill-every 60
"""

from __future__ import annotations

import asyncio
import itertools
import json
import os
import random
import signal
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import aiohttp
import click

KILLED = ("ray::ServeReplica:unispec:Model", "unispec.deployment.launch")
"""How the processes of a replica are called, and what the command line of its server has."""
WORDS = "the sky is blue because light of short waves is scattered more by what air is made of"
PROMPTS = 40


def bodies(draw: random.Random, longest: int) -> Iterator[dict[str, Any]]:
    """Requests of mixed length: greedy or sampled, as a stream or not."""
    words = WORDS.split()
    for number in range(PROMPTS):
        sampling = {"temperature": 0} if number % 2 else {"temperature": 1, "seed": number}
        yield {
            "prompt": " ".join(draw.choices(words, k=draw.randint(1, longest))),
            "max_tokens": draw.randint(1, 64),
            "ignore_eos": True,
            "stream": number % 4 < 2,
            **sampling,
        }


async def ask(client: aiohttp.ClientSession, body: dict[str, Any]) -> tuple[str, str, bool]:
    """What became of a request, its text so far, and whether a replica was lost meanwhile."""
    text = ""
    try:
        async with client.post("/v1/completions", json=body) as answer:
            retried = answer.headers.get("x-unispec-retries", "0") != "0"
            if answer.status in (429, 503):
                return "refused", "", retried
            if answer.status != 200:
                return f"status {answer.status}", "", retried
            if not body["stream"]:
                return "answered", (await answer.json())["choices"][0]["text"], retried
            async for line in answer.content:
                data = line.strip().removeprefix(b"data: ")
                if data == b"[DONE]":
                    return "answered", text, retried
                event = json.loads(data) if data else {"choices": []}
                if "error" in event:
                    return "ended with an error event", text, retried
                text += "".join(choice["text"] for choice in event["choices"])
    except (aiohttp.ClientError, ConnectionError, json.JSONDecodeError):
        pass
    return "lost", text, False


async def kill_replicas(seconds: float, counts: Counter[str]) -> None:
    """Kills one every so many seconds."""
    for name in itertools.cycle(KILLED):
        await asyncio.sleep(seconds)
        found = []
        for line in Path("/proc").glob("[0-9]*/cmdline"):
            try:
                if name in line.read_text().replace("\0", " "):
                    found.append(int(line.parent.name))
            except OSError:
                continue
        if found:
            os.kill(random.choice(found), signal.SIGKILL)
            counts["replicas killed"] += 1


async def run(
    url: str,
    requests: int,
    minutes: float,
    kill_every: float | None,
    disconnects: float,
    longest: int,
    seed: int,
) -> Counter[str]:
    """Asks, and counts."""
    draw, counts = random.Random(seed), Counter[str](requests=requests)
    asked = list(bodies(draw, longest))
    unlimited = aiohttp.TCPConnector(limit=0)
    timeout = aiohttp.ClientTimeout(total=600)
    async with aiohttp.ClientSession(url, connector=unlimited, timeout=timeout) as client:
        alone = []
        for body in asked:
            end, text, _ = await ask(client, body)
            if end != "answered":
                raise click.ClickException(f"the answer alone: {end}; is {url} ready?")
            alone.append(text)

        async def one(at: int, leaves_after: float | None) -> None:
            number = at % PROMPTS
            try:
                end, text, retried = await asyncio.wait_for(
                    ask(client, asked[number]), leaves_after
                )
            except asyncio.TimeoutError:
                counts["left by the client"] += 1
                return
            counts[end] += 1
            if end == "answered":
                counts["answered, after a retry"] += retried
                counts["answered, equal to alone"] += text == alone[number]
            elif not alone[number].startswith(text):
                counts["wrong before the error"] += 1

        killing = asyncio.create_task(
            asyncio.sleep(0) if kill_every is None else kill_replicas(kill_every, counts)
        )
        tasks = []
        for at in range(requests):
            leaves = draw.uniform(0, 0.3) if draw.random() < disconnects else None
            tasks.append(asyncio.create_task(one(at, leaves)))
            await asyncio.sleep(draw.expovariate(requests / (60 * minutes)))
        await asyncio.gather(*tasks)
        killing.cancel()
    return counts


ROWS = (
    "requests",
    "answered",
    "answered, after a retry",
    "answered, equal to alone",
    "refused",
    "ended with an error event",
    "left by the client",
    "lost",
    "wrong before the error",
    "replicas killed",
)


@click.command()
@click.option("--url", default="http://127.0.0.1:8000", show_default=True, help="The endpoint.")
@click.option("--requests", default=400, show_default=True, help="How many.")
@click.option("--minutes", default=1.0, show_default=True, help="In which they come.")
@click.option("--kill-every", type=float, help="Seconds between kills.  [default: none is killed]")
@click.option("--disconnects", default=0.05, show_default=True, help="Share of clients that leave.")
@click.option("--longest", default=60, show_default=True, help="Most words of a prompt.")
@click.option("--seed", default=0, show_default=True, help="Of lengths and times.")
@click.option("--json", "as_json", is_flag=True, help="Print the counts as JSON.")
def main(as_json: bool, **options: Any) -> None:
    """Ask replicas many things while they are killed, and count what became of each request."""
    counts = asyncio.run(run(**options))
    table = {row: counts[row] for row in {**dict.fromkeys(ROWS), **counts}}
    if as_json:
        print(json.dumps(table))
    else:
        print("\n".join(f"{row:28}{count:>7}" for row, count in table.items()))


if __name__ == "__main__":
    main()
