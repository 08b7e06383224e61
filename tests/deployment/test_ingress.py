"""What an ingress does with what replicas answer, or do not; the replicas are this file's."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest
from ray.exceptions import ActorDiedError, RayTaskError
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError
from starlette.requests import Request

from unispec.deployment import ingress
from unispec.deployment.ingress import Ingress
from unispec.deployment.messages import Asked, Head, ServerLost

WHOLE = Head(200, [("content-type", "application/json"), ("x-unispec-replica", "one")])
STREAM = Head(200, [("content-type", "text/event-stream; charset=utf-8")])
FULL = BackPressureError(64, 64, status_code=429, retry_after_s=1.5)
LOST = RayTaskError("forward", "a trace", ServerLost("it has ended")).as_instanceof_cause()


class Pieces:
    """What one call of a replica brings: pieces, and what goes wrong behind them."""

    def __init__(self, *pieces: Head | bytes | Exception) -> None:
        self._pieces = list(pieces)
        self.cancelled = False

    async def __anext__(self) -> Head | bytes:
        if not self._pieces:
            raise StopAsyncIteration
        piece = self._pieces.pop(0)
        if isinstance(piece, Exception):
            raise piece
        return piece

    def __aiter__(self) -> AsyncIterator[Any]:
        return self

    def cancel(self) -> None:
        self.cancelled = True


class Replicas:
    """A handle whose calls are answered in their order."""

    def __init__(self, *calls: Pieces) -> None:
        self._calls = iter(calls)
        self.asked: list[Asked] = []

    def options(self, **_: object) -> Replicas:
        return self

    def remote(self, asked: Asked) -> Pieces:
        self.asked.append(asked)
        return next(self._calls)

    def broadcast(self, method: str) -> Any:
        raise DeploymentUnavailableError(None)


@pytest.fixture(autouse=True)
def no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ingress, "_FIRST_PAUSE_S", 0)


def send(replicas: Replicas, path: str = "/v1/completions", **request: Any) -> httpx.Response:
    served = Ingress(replicas)

    async def app(scope: Any, receive: Any, send: Any) -> None:
        response = await served(Request(scope, receive))
        await response(scope, receive, send)

    async def ask() -> httpx.Response:
        transport = httpx.ASGITransport(app)
        async with httpx.AsyncClient(transport=transport, base_url="http://here") as client:
            return await client.request("POST" if "json" in request else "GET", path, **request)

    return asyncio.run(ask())


def test_a_request_and_its_answer_pass_as_they_are() -> None:
    replicas = Replicas(Pieces(WHOLE, b'{"a":1}'))
    headers = {"authorization": "Bearer key", "x-session-id": "s"}
    answer = send(replicas, "/v1/completions?q=%20", json={"prompt": "p"}, headers=headers)
    (asked,) = replicas.asked
    assert (asked.method, asked.path) == ("POST", "/v1/completions?q=%20")
    assert asked.body == b'{"prompt":"p"}'
    assert ("authorization", "Bearer key") in asked.headers and ("host", "here") in asked.headers
    assert asked.affinity.session is not None and len(asked.affinity.blocks) == 1
    assert (answer.status_code, answer.content) == (200, b'{"a":1}')
    assert answer.headers["content-length"] == "7"
    assert answer.headers["x-unispec-replica"] == "one"
    assert answer.headers["x-unispec-retries"] == "0"


@pytest.mark.parametrize("lost", [LOST, ActorDiedError(), DeploymentUnavailableError(None)])
@pytest.mark.parametrize("begun", [(), (WHOLE,), (STREAM,)])
def test_what_has_not_begun_goes_to_another_replica(lost: Exception, begun: Any) -> None:
    replicas = Replicas(Pieces(*begun, lost), Pieces(*begun, lost), Pieces(WHOLE, b"{}"))
    answer = send(replicas, json={"prompt": "p"})
    assert (answer.status_code, answer.content) == (200, b"{}")
    assert answer.headers["x-unispec-retries"] == "2"
    assert replicas.asked[0] == replicas.asked[1] == replicas.asked[2]


def test_a_stream_that_breaks_ends_with_an_error_event_and_is_not_asked_again() -> None:
    replicas = Replicas(Pieces(STREAM, b"data: 1\n\n", b"data: 2\n\n", LOST))
    answer = send(replicas, json={"prompt": "p", "stream": True})
    *events, error, end = answer.text.split("\n\n")
    assert (events, end) == (["data: 1", "data: 2"], "")
    assert error.startswith('data: {"error":{"message":"the replica was lost before the answer')
    assert "[DONE]" not in answer.text


def test_where_no_replica_answers_a_client_is_told_to_come_back() -> None:
    replicas = Replicas(*(Pieces(LOST) for _ in range(6)))
    answer = send(replicas, json={"prompt": "p"})
    assert (answer.status_code, answer.headers["retry-after"]) == (503, "5")
    assert answer.json()["error"]["message"] == "no replica answers; try again later"
    assert len(replicas.asked) == 6


def test_a_full_queue_refuses_what_is_new_and_keeps_what_has_lost_its_replica() -> None:
    refused = send(Replicas(Pieces(FULL)), json={"prompt": "p"})
    assert (refused.status_code, refused.headers["retry-after"]) == (429, "2")
    assert refused.json()["error"]["type"] == "rate_limit_error"
    kept = send(Replicas(Pieces(LOST), Pieces(FULL), Pieces(WHOLE, b"{}")), json={"prompt": "p"})
    assert (kept.status_code, kept.content) == (200, b"{}")


def test_who_has_lost_its_replica_waits_for_room_as_long_as_it_takes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(ingress, "_LONGEST_PAUSE_S", 0.0)
    lost = Pieces(LOST)
    full = (Pieces(FULL) for _ in range(30))
    kept = send(Replicas(lost, *full, Pieces(WHOLE, b"{}")), json={"prompt": "p"})
    assert (kept.status_code, kept.content) == (200, b"{}")
    # It may run on where it was.
    assert lost.cancelled


def test_without_replicas_it_is_healthy_and_has_no_metrics() -> None:
    replicas = Replicas()
    assert send(replicas, "/health").json() == {"status": "ready"}
    metrics = send(replicas, "/metrics")
    assert (metrics.status_code, metrics.text) == (200, "")
    assert replicas.asked == []


def test_a_request_that_is_cancelled_is_cancelled_in_its_replica() -> None:
    class Waiting(Pieces):
        async def __anext__(self) -> Head | bytes:
            await asyncio.sleep(60)
            raise AssertionError

    waiting = Waiting()

    async def leave() -> None:
        scope = {"type": "http", "method": "GET", "path": "/v1/models", "headers": []}
        request = Request(scope | {"query_string": b""}, _no_body)
        asking = asyncio.create_task(Ingress(Replicas(waiting))(request))
        await asyncio.sleep(0.1)
        asking.cancel()
        await asyncio.wait({asking})
        assert asking.cancelled()

    asyncio.run(leave())
    assert waiting.cancelled


async def _no_body() -> dict[str, Any]:
    return {"type": "http.request", "body": b"", "more_body": False}
