"""A Ray cluster of two machines, which are processes of this one, and an application on it."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import ray
import yaml
from ray import serve
from ray.cluster_utils import Cluster
from ray.serve.schema import ApplicationStatus

__all__ = ["REPLICA", "SERVER", "Answer", "Deployed", "deployed", "kill", "processes", "until"]

START_S = 300
"""Room for two servers to start beside other tests."""
REPLICA = "ray::ServeReplica:unispec:Model"
"""What the process of a replica is called."""
SERVER = "unispec.deployment.launch"
"""What the command line of its server has."""


@dataclass
class Answer:
    """What a client has got."""

    status: int
    replica: str
    retries: int
    token_ids: list[int]
    whole: bool = False
    """A stream: [DONE] has come; a body: all of it has."""
    error: str = ""
    """What an error event says, or a refusal."""


class Deployed:
    """The cluster, and what is deployed on it.

    Attributes:
        cluster: its head has the ingress; each machine has room for one replica.
        url: of the endpoint.
    """

    def __init__(self, cluster: Cluster, folder: Path, options: dict[str, Any]) -> None:
        self.cluster = cluster
        self._folder = folder
        self._options = options
        with socket.create_server(("127.0.0.1", 0)) as free:
            self._port = free.getsockname()[1]
        self.url = f"http://127.0.0.1:{self._port}"
        self.http = httpx.Client(base_url=self.url, timeout=120)

    def deploy(self, model: dict[str, Any] | None = None, **options: Any) -> None:
        """Runs `serve run` with a configuration, and waits until all of it holds.

        Args:
            model: of the deployment of the model, in Serve's own schema.
            options: of `unispec serve`, beside the usual ones.
        """
        ingress = {
            "name": "Ingress",
            "ray_actor_options": {"num_cpus": 0, "resources": {"head": 0.1}},
        }
        replicas = {
            "name": "Model",
            "num_replicas": 2,
            "health_check_period_s": 1,
            # Both machines are this one, so neither replica keeps to its first processor.
            "ray_actor_options": {"num_cpus": 0, "resources": {"model": 1}},
            **(model or {}),
        }
        application = {
            "name": "unispec",
            "route_prefix": "/",
            "import_path": "unispec.deployment.app:app",
            "args": {**self._options, **options},
            "deployments": [ingress, replicas],
        }
        config = {
            "proxy_location": "HeadOnly",
            "http_options": {"port": self._port},
            "applications": [application],
        }
        path = self._folder / "config.yaml"
        path.write_text(yaml.safe_dump(config))
        command = [str(Path(sys.executable).with_name("serve")), "run", "--non-blocking", str(path)]
        environment = {**os.environ, "RAY_ADDRESS": self.cluster.address}
        began = time.time()
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        until(lambda: _runs_since(began))

    def replicas(self) -> set[str]:
        """Names of those that export metrics."""
        return set(re.findall(r'replica="(\w+)"', self.http.get("/metrics").text))

    def until_replicas(self, count: int) -> set[str]:
        """Waits until there are so many."""
        return until(lambda: found if len(found := self.replicas()) == count else set())

    def complete(self, **fields: Any) -> Answer:
        """Asks, and reads a stream as it comes."""
        return self.begin(**fields)()

    def begin(self, headers: dict[str, str] | None = None, **fields: Any) -> Callable[[], Answer]:
        """Asks; what is returned reads the rest. Of a stream the first event has come then."""
        body = {"return_token_ids": True, "temperature": 0, **fields}
        request = self.http.build_request("POST", "/v1/completions", json=body, headers=headers)
        response = self.http.send(request, stream=True)
        answer = Answer(
            response.status_code,
            response.headers.get("x-unispec-replica", ""),
            int(response.headers.get("x-unispec-retries", "0")),
            [],
        )
        if not fields.get("stream") or answer.status != 200:
            found = json.loads(response.read())
            response.close()
            answer.error = found.get("error", {}).get("message", "")
            if not answer.error:
                answer.token_ids, answer.whole = found["choices"][0]["token_ids"], True
            return lambda: answer
        lines = response.iter_lines()
        first = next(lines)

        def rest() -> Answer:
            for line in (first, *lines):
                assert (not answer.whole and not answer.error) or not line, (
                    "nothing follows the end"
                )
                if line == "data: [DONE]":
                    answer.whole = True
                elif line:
                    event = json.loads(line.removeprefix("data: "))
                    answer.error = event.get("error", {}).get("message", "")
                    for choice in event.get("choices", ()):
                        answer.token_ids += choice["token_ids"]
            response.close()
            return answer

        return rest


@contextmanager
def deployed(folder: Path, options: dict[str, Any]) -> Iterator[Deployed]:
    """A cluster on which nothing is deployed yet."""
    head = {"num_cpus": 2, "resources": {"head": 1, "model": 1}, "include_dashboard": False}
    cluster = Cluster(initialize_head=True, head_node_args=head)
    try:
        cluster.add_node(num_cpus=2, resources={"model": 1})
        ray.init(address=cluster.address, log_to_driver=False)
        yield Deployed(cluster, folder, options)
    finally:
        ray.shutdown()
        cluster.shutdown()


def _runs_since(began: float) -> bool:
    """Whether the application has become what it was told to be after a time."""
    application = serve.status().applications.get("unispec")
    return (
        application is not None
        and application.last_deployed_time_s >= began
        and application.status == ApplicationStatus.RUNNING
    )


def until(found: Callable[[], Any]) -> Any:
    """The first result that is true."""
    deadline = time.monotonic() + START_S
    while not (result := found()):
        assert time.monotonic() < deadline
        time.sleep(0.2)
    return result


def processes(name: str, model: str | None = None) -> list[int]:
    """Processes of replicas or servers, the oldest first.

    Args:
        name: `REPLICA` or `SERVER`.
        model: a folder that the server's command line names.
    """
    found = []
    for folder in Path("/proc").iterdir():
        if folder.name.isdecimal():
            try:
                line = (folder / "cmdline").read_text().replace("\0", " ")
            except OSError:
                continue
            if name in line and (model is None or model in line):
                found.append(int(folder.name))
    return sorted(found)


def kill(process: int) -> None:
    """Ends a process as a lack of memory does."""
    os.kill(process, signal.SIGKILL)
