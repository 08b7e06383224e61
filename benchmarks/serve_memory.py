"""Memory of a server's processes over many requests of mixed length, some of which are left.

Prints the resident memory of each process after every tenth of them; it should not grow after the
first.
"""

from __future__ import annotations

import random
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import click
import httpx
from servers import wait_until_ready


def processes(pid: int) -> list[int]:
    """A process and all that it has started, oldest first."""
    found = [pid]
    for status in sorted(Path("/proc").glob("[0-9]*/stat")):
        try:
            parent = int(status.read_text().rpartition(")")[2].split()[1])
        except OSError:
            continue
        if parent == pid:
            found += processes(int(status.parent.name))
    return found


def resident_mib(pid: int) -> float:
    """What it holds in memory."""
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * 4096 / 2**20


@click.command(help=__doc__, context_settings={"show_default": True})
@click.option("--requests", type=click.IntRange(min=10), default=5000)
@click.option("--port", default=8090)
@click.argument("options", nargs=-1)
def main(requests: int, port: int, options: tuple[str, ...]) -> None:
    """OPTIONS are those of `unispec serve`, after --; by default --demo."""
    command = [sys.executable, "-m", "unispec.cli", "serve", "--port", str(port)]
    command += ["--metrics-port", "0", *(options or ("--demo", "--max-length", "512"))]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    url = f"http://127.0.0.1:{port}"
    try:
        wait_until_ready(process, url)
        model = httpx.get(f"{url}/v1/models").json()["data"][0]["id"]
        chance = random.Random(0)
        jobs = [
            {
                "model": model,
                "prompt": [chance.randrange(3, 200) for _ in range(chance.randrange(1, 200))],
                "max_tokens": chance.randrange(1, 24),
                "temperature": chance.choice([0, 1]),
                "stream": chance.random() < 0.5,
                "n": chance.choice([1, 1, 1, 3]),
                "logprobs": chance.choice([None, None, 5]),
                "presence_penalty": chance.choice([0, 0.5]),
            }
            for _ in range(requests)
        ]
        pids = processes(process.pid)
        print("requests " + " ".join(f"{pid:>9}" for pid in pids), "MiB", flush=True)
        codes: dict[int, int] = {}
        with httpx.Client(base_url=url, timeout=600) as client, ThreadPoolExecutor(12) as pool:

            def ask(job: dict[str, object]) -> int:
                if job["stream"] and job["n"] == 3:  # leaves after the first piece
                    with client.stream("POST", "/v1/completions", json=job) as answer:
                        next(answer.iter_lines())
                        return answer.status_code
                return client.post("/v1/completions", json=job).status_code

            tenth = max(1, requests // 10)
            for start in range(0, requests, tenth):
                for code in pool.map(ask, jobs[start : start + tenth]):
                    codes[code] = codes.get(code, 0) + 1
                sizes = " ".join(f"{resident_mib(pid):9.1f}" for pid in pids)
                print(f"{min(start + tenth, requests):8} {sizes}", flush=True)
        print("statuses", codes)
    finally:
        process.terminate()
        process.wait()


if __name__ == "__main__":
    main()
