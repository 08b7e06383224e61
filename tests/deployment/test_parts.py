"""Options, events, processors and metrics of replicas, without a cluster."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families
from ray.serve import Application
from ray.serve.schema import ServeDeploySchema

from unispec.deployment.app import INGRESS, MODEL, app
from unispec.deployment.exposition import merge
from unispec.deployment.options import command_line
from unispec.deployment.replica import processors_of, whole_events
from unispec.errors import InputError

EXAMPLES = Path(__file__).resolve().parents[2] / "examples" / "ray_serve"


def test_options_are_those_of_the_command_line() -> None:
    options = {
        "model": "path/to/model",
        "max_batch_size": 4,
        "demo": True,
        "page": False,
        "weight-path": ["a", "b"],
        # As `serve run unispec.deployment:app no_speculation=true` passes it.
        "no_speculation": "true",
    }
    assert command_line(options) == [
        "--model=path/to/model",
        "--max-batch-size=4",
        "--demo",
        "--no-page",
        "--weight-path=a",
        "--weight-path=b",
        "--no-speculation",
    ]


@pytest.mark.parametrize("name", ["port", "host", "metrics-port", "metrics_port", "ssl-keyfile"])
def test_what_each_replica_has_for_itself_is_refused(name: str) -> None:
    with pytest.raises(InputError, match=f"{name} is chosen for each replica"):
        app({"demo": True, name: 1})


def test_the_builder_makes_an_application() -> None:
    assert isinstance(app({"demo": True}), Application)


def example(name: str) -> Any:
    read = yaml.safe_load((EXAMPLES / name).read_text(encoding="utf-8"))
    return yaml.safe_load(read["spec"]["serveConfigV2"]) if read.get("kind") else read


@pytest.mark.parametrize("name", ["serve.yaml", "rayservice.yaml"])
def test_examples_are_configurations_of_ray_serve(name: str) -> None:
    (application,) = ServeDeploySchema.model_validate(example(name)).applications
    assert application.import_path == f"{app.__module__}:{app.__name__}"
    assert [deployment.name for deployment in application.deployments] == [INGRESS, MODEL]
    assert isinstance(app(application.args), Application)


async def _pieces(*pieces: bytes) -> AsyncIterator[bytes]:
    for piece in pieces:
        yield piece


def test_events_are_cut_between_two_of_them_only() -> None:
    async def collect() -> list[bytes]:
        stream = _pieces(b"data: 1\n", b"\ndata: 2\n\nda", b"ta: 3", b"\n\n", b"data: [DONE]\n\n")
        return [events async for events in whole_events(stream)]

    assert asyncio.run(collect()) == [
        b"data: 1\n\ndata: 2\n\n",
        b"data: 3\n\n",
        b"data: [DONE]\n\n",
    ]


def test_a_stream_that_breaks_within_an_event_does_not_give_it() -> None:
    async def broken() -> AsyncIterator[bytes]:
        yield b"data: 1\n\ndata: {"
        raise ConnectionResetError

    found = []

    async def collect() -> None:
        async for events in whole_events(broken()):
            found.append(events)

    with pytest.raises(ConnectionResetError):
        asyncio.run(collect())
    assert found == [b"data: 1\n\n"]


def test_replicas_of_one_machine_share_no_processors() -> None:
    usable = [0, 1, 4, 5, 6, 7, 9]
    taken = [processors_of(usable, 2, rank) for rank in range(3)]
    assert taken == [[0, 1], [4, 5], [6, 7]]
    # While a rolling update runs there may be more of them than places.
    assert processors_of(usable, 2, 3) == [0, 1]
    assert processors_of(usable, 3, 1) == [5, 6, 7]


@pytest.mark.parametrize("count", [0, 4, 5])
def test_who_is_given_none_or_all_runs_anywhere(count: int) -> None:
    assert processors_of(range(4), count, 0) == []


def test_metrics_of_replicas_are_one_text_that_tells_them_apart() -> None:
    text = (
        "# HELP requests_total Requests.\n# TYPE requests_total counter\n"
        'requests_total{code="200",path="/v1/{x}"} %d\n'
        "# TYPE unused gauge\n"
        "# HELP load Load.\n# TYPE load gauge\nload %d\nload{} %d\n"
    )
    merged = merge({"one": text % (1, 2, 3), "two": text % (4, 5, 6)})
    for head in ("# TYPE requests_total counter\n", "# TYPE unused gauge\n"):
        assert merged.count(head) == 1
    families = {family.name: family for family in text_string_to_metric_families(merged)}
    assert [
        (sample.labels["replica"], sample.labels["code"], sample.labels["path"], sample.value)
        for sample in families["requests"].samples
    ] == [("one", "200", "/v1/{x}", 1), ("two", "200", "/v1/{x}", 4)]
    assert [(sample.labels, sample.value) for sample in families["load"].samples] == [
        ({"replica": "one"}, 2),
        ({"replica": "one"}, 3),
        ({"replica": "two"}, 5),
        ({"replica": "two"}, 6),
    ]


def test_no_replica_has_no_metrics() -> None:
    assert merge({}) == ""
