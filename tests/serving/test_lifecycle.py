"""How a server begins and ends, and whom it lets in."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from safetensors.numpy import load_file, save_file
from servers import PRESET, Served, ready_url, serving, start
from tiny import TinyPair

pytestmark = pytest.mark.compiles(PRESET)

LONG: dict[str, Any] = {
    "prompt": [5, 6, 7],
    "max_tokens": 500,
    "ignore_eos": True,
    "stream": True,
}


def children(process: int) -> dict[int, str]:
    """Processes that one has started, and theirs, with their command lines."""
    found = {}
    for folder in Path("/proc").iterdir():
        if folder.name.isdecimal():
            try:
                status = (folder / "stat").read_text().rpartition(")")[2].split()
                line = (folder / "cmdline").read_text()
            except OSError:
                continue
            if int(status[1]) == process:
                found[int(folder.name)] = line
                found |= children(int(folder.name))
    return found


def model_worker(process: int) -> int:
    """The child that has read the most."""

    def memory(pid: int) -> int:
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1])

    return max(children(process), key=memory)


def test_it_says_what_it_does_from_the_first_request_to_the_last(chat_pair: TinyPair) -> None:
    process, lines = start(chat_pair, "--port", str(port := free_port()))
    try:
        url = f"http://127.0.0.1:{port}"
        early = until_answered(f"{url}/v1/models")
        assert early.status_code == 503 and early.headers["retry-after"] == "5"
        assert "the server is starting" in early.json()["error"]["message"]
        assert httpx.get(f"{url}/health").status_code == 503
        assert httpx.get(f"{url}/health/ready").status_code == 503
        assert httpx.get(f"{url}/health/live").status_code == 200
        status = httpx.get(f"{url}/status").json()
        assert (status["state"], status["model"]) == ("starting", "tiny")
        assert ready_url(process, lines) == url
        assert httpx.get(f"{url}/health").json() == {"status": "ready"}
        status = httpx.get(f"{url}/status").json()
        assert (status["state"], status["max_length"], status["num_speculative_tokens"]) == (
            "ready",
            512,
            5,
        )

        pieces: list[str] = []
        with httpx.stream("POST", f"{url}/v1/completions", json=LONG, timeout=60) as answer:
            events = answer.iter_lines()
            pieces.append(next(events))
            # To all of its processes, as a supervisor or a terminal sends it.
            for pid in (*children(process.pid), process.pid):
                os.kill(pid, signal.SIGTERM)
            late = until_refused(url)
            pieces += events
        assert late is None or "the server is stopping" in late.json()["error"]["message"]
        assert pieces[-2:] == ["data: [DONE]", ""]
        last = json.loads(pieces[-4].removeprefix("data: "))
        assert last["choices"][0]["finish_reason"] == "length"
        assert process.wait(30) == 0
    finally:
        process.kill()


def test_a_killed_worker_ends_the_server(chat_pair: TinyPair) -> None:
    process, lines = start(chat_pair)
    try:
        url = ready_url(process, lines)
        with httpx.stream("POST", f"{url}/v1/completions", json=LONG, timeout=60) as answer:
            events = answer.iter_lines()
            next(events)
            os.kill(model_worker(process.pid), signal.SIGKILL)
            began = time.monotonic()
            rest = [line for line in events if line]
        error = json.loads(rest[-1].removeprefix("data: "))
        assert "the model's process has ended" in error["error"]["message"]
        assert process.wait(10) == 1
        assert time.monotonic() - began < 10
        assert any("The model's process has ended (Killed)" in line for line in lines), lines
        assert not any("Traceback" in line for line in lines), lines
        assert not children(process.pid)
    finally:
        process.kill()


def test_options_of_a_server_that_is_killed(chat_pair: TinyPair, tmp_path: Path) -> None:
    """Key, certificate, queue, no page; nothing is reported, and nothing is left behind."""
    certificate, key = tmp_path / "cert.pem", tmp_path / "key.pem"
    subprocess.run(
        [
            *("openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2"),
            *("-subj", "/CN=localhost", "-addext", "subjectAltName=IP:127.0.0.1"),
            *("-keyout", str(key), "-out", str(certificate)),
        ],
        check=True,
        capture_output=True,
    )
    with (
        reports() as (seen, endpoints),
        serving(
            chat_pair,
            *("--ssl-certfile", str(certificate), "--ssl-keyfile", str(key), "--no-page"),
            *("--max-queue-size", "1", "--max-batch-size", "1"),
            UNISPEC_API_KEY="secret",
            **endpoints,
        ) as served,
    ):
        assert served.url.startswith("https://")
        trust = ssl.create_default_context(cafile=str(certificate))
        with httpx.Client(base_url=served.url, verify=trust, timeout=60) as client:
            check_key(client)
            check_queue(client)
            assert client.get("/").status_code == 404
        assert remote_connections(served) == set()
        workers = children(served.process.pid)
        assert len(workers) >= 2
        served.process.kill()
        served.process.wait()
        deadline = time.monotonic() + 15
        while any(Path(f"/proc/{pid}").exists() for pid in workers):
            assert time.monotonic() < deadline, workers
            time.sleep(0.1)
        assert seen == []


def check_key(client: httpx.Client) -> None:
    for headers in ({}, {"authorization": "Bearer other"}, {"authorization": "secret"}):
        refused = client.get("/v1/models", headers=headers)
        assert refused.status_code == 401
        assert "the API key is missing or wrong" in refused.json()["error"]["message"]
    for path in ("/health", "/status", "/metrics"):
        assert client.get(path).status_code == 200
    client.headers["authorization"] = "Bearer secret"
    assert client.get("/v1/models").status_code == 200


def check_queue(client: httpx.Client) -> None:
    """Of many requests at once one may wait; the others are sent away."""
    found: list[httpx.Response] = []

    def ask() -> None:
        found.append(client.post("/v1/completions", json={"prompt": [5] * 400, "max_tokens": 2}))

    threads = [threading.Thread(target=ask) for _ in range(24)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert {answer.status_code for answer in found} == {200, 429}
    refused = next(answer for answer in found if answer.status_code == 429)
    assert refused.headers["retry-after"] == "1"
    assert refused.json()["error"]["type"] == "rate_limit_error"


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--model", "nowhere"], "nowhere"),
        (["--ssl-certfile", __file__], "HTTPS needs --ssl-certfile and --ssl-keyfile"),
        (["--ssl-certfile", __file__, "--ssl-keyfile", __file__], "cannot be used"),
        (["--api-key", " "], "the API key is empty, or has spaces"),
        (["--served-model-name", ""], "--served-model-name is empty"),
        (["--port", "8777", "--metrics-port", "8777"], "--port and --metrics-port are both 8777"),
        (["--host", "no.such.host.invalid"], "--host no.such.host.invalid is not known"),
        (["--max-queue-size", "0"], "0 is not in the range x>=1"),
    ],
)
def test_wrong_options_are_one_sentence(chat_pair: TinyPair, options: list[str], said: str) -> None:
    process, lines = start(chat_pair, *options)
    assert process.wait(60) == 2
    time.sleep(0.2)
    assert said in lines[-1] and lines[-1].startswith("error: "), lines


def test_a_port_that_is_taken(chat_pair: TinyPair) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        for option in ("--port", "--metrics-port"):
            process, lines = start(chat_pair, option, str(port))
            assert process.wait(60) == 2
            time.sleep(0.2)
            assert f"error: {option} {port} of 127.0.0.1 cannot be used" in lines[-1]


def test_weights_that_do_not_fit_are_one_sentence(chat_pair: TinyPair, tmp_path: Path) -> None:
    """Found in the model's process, told by the command."""
    broken = tmp_path / "draft"
    assert chat_pair.draft is not None
    shutil.copytree(chat_pair.draft, broken)
    tensors = load_file(broken / "model.safetensors")
    name = next(name for name in tensors if "down_proj" in name)
    tensors[name] = tensors[name][:, :-1].copy()
    save_file(tensors, broken / "model.safetensors")
    process, lines = start(TinyPair(chat_pair.target, broken, chat_pair.method))
    assert process.wait(120) == 2
    time.sleep(0.2)
    errors = [line for line in lines if line.startswith("error: ")]
    assert len(errors) == 1 and "down_proj" in errors[0], lines
    assert not any("Traceback" in line for line in lines)


def test_generate_reports_nothing_either(chat_pair: TinyPair) -> None:
    """That it would be seen shows the same engine with reports turned on."""
    begin = "from max.driver import CPU; from max.engine import InferenceSession as S; S([CPU()])"
    command = [
        *(sys.executable, "-m", "unispec.cli", "generate", "--model", str(chat_pair.target)),
        *("--draft-model-path", str(chat_pair.draft), "--speculative-method", "eagle"),
        *("--num-speculative-tokens", "5", "--max-length", "512", "--prompt", "Hello"),
    ]
    with reports() as (seen, endpoints):
        environment = {**os.environ, **endpoints}
        turned_on = {**environment, "MODULAR_TELEMETRY_ENABLED": "1"}
        subprocess.run([sys.executable, "-c", begin], env=turned_on, check=True)
        deadline = time.monotonic() + 20
        while not seen and time.monotonic() < deadline:
            time.sleep(0.1)
        assert seen, "MAX 26.7 reports when a session begins"
        seen.clear()
        subprocess.run(command, env=environment, check=True, capture_output=True)
        time.sleep(1)
        assert seen == []


@contextmanager
def reports() -> Iterator[tuple[list[bytes], dict[str, str]]]:
    """A socket, and variables that name it wherever MAX would report to; what it was sent."""
    seen: list[bytes] = []
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        listening.listen(64)
        url = f"http://127.0.0.1:{listening.getsockname()[1]}"

        def accept() -> None:
            while True:
                try:
                    connection, _ = listening.accept()
                except OSError:
                    return
                connection.settimeout(5)
                with connection:
                    seen.append(connection.recv(100))

        threading.Thread(target=accept, daemon=True).start()
        yield (
            seen,
            {
                "MODULAR_TELEMETRY_EXPORTERS_LOGS_HTTP_ENDPOINT": url,
                "MODULAR_TELEMETRY_EXPORTERS_METRICS_HTTP_ENDPOINT": url,
                "OTEL_EXPORTER_OTLP_ENDPOINT": url,
            },
        )


def remote_connections(served: Served) -> set[str]:
    """Addresses of other machines that a server's processes talk to, as the kernel lists them."""
    inodes = set()
    for pid in (served.process.pid, *children(served.process.pid)):
        for entry in Path(f"/proc/{pid}/fd").iterdir():
            try:
                target = os.readlink(entry)
            except OSError:
                continue
            if target.startswith("socket:["):
                inodes.add(target[8:-1])
    remote = set()
    for table in ("tcp", "tcp6", "udp", "udp6"):
        for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
            fields = line.split()
            address = fields[2].partition(":")[0]
            if (
                fields[9] in inodes
                and set(address) != {"0"}
                and "7F" not in (address[-2:], address[30:])
            ):
                remote.add(address)
    return remote


def until_answered(url: str) -> httpx.Response:
    deadline = time.monotonic() + 120
    while True:
        try:
            return httpx.get(url)
        except httpx.TransportError:
            assert time.monotonic() < deadline
            time.sleep(0.1)


def until_refused(url: str) -> httpx.Response | None:
    """The answer to a new request of a server that ends; None if it takes no connection."""
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        try:
            answer = httpx.get(f"{url}/v1/models")
        except httpx.TransportError:
            return None
        if answer.status_code == 503:
            return answer
        time.sleep(0.05)
    raise TimeoutError


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])
