"""What clients talk to: passes requests to a replica, and to another one where that is lost."""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections.abc import AsyncIterator
from typing import Any, Final

from ray.exceptions import RayError, TaskCancelledError
from ray.serve.exceptions import BackPressureError, RayServeException
from ray.serve.handle import DeploymentHandle
from ray.serve.metrics import Counter
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse

from unispec.serving.body import whole_body
from unispec.serving.refusal import Refused, error_body, to_json

from .affinity import affinity_of
from .exposition import merge
from .messages import Asked, Head

__all__ = ["RETRIES", "Ingress"]

logger = logging.getLogger("ray.serve")

RETRIES: Final = "x-unispec-retries"
"""A header of answers: how many replicas were lost before this one answered."""

_ATTEMPTS: Final = 6
_FIRST_PAUSE_S: Final = 0.1
"""Each pause is twice the one before, until a lost replica is known to all."""
_LONGEST_PAUSE_S: Final = 1.0
_PATIENCE_S: Final = 60
"""How long one that has lost its replica waits for room in the queue."""
_METRICS_S: Final = 5
_NOT_PASSED_ON: Final = frozenset(
    {"accept-encoding", "connection", "content-length", "expect", "keep-alive", "transfer-encoding"}
)


class Ingress:
    """Answers HTTP by what a replica answers.

    Args:
        model: the deployment of `Replica`.
    """

    def __init__(self, model: DeploymentHandle[Any]) -> None:
        self._model = model
        self._forward = model.options(method_name="forward", stream=True)
        self._retries = Counter("unispec_retries", "Requests that were sent to another replica.")
        self._cut = Counter("unispec_cut_streams", "Streams that ended with an error event.")

    async def __call__(self, request: Request) -> Response:
        """Answers a request; `/health` and `/metrics` by itself."""
        path = request.scope["path"].removeprefix(request.scope.get("root_path", ""))
        if path in ("/health", "/health/live", "/health/ready"):
            return _json(200, to_json({"status": "ready"}))
        if path == "/metrics":
            return await self._metrics()
        try:
            body = await whole_body(request)
            query = request.scope["query_string"].decode("latin-1")
            return await self._answer(
                Asked(
                    request.method,
                    f"{path}?{query}" if query else path,
                    [pair for pair in request.headers.items() if pair[0] not in _NOT_PASSED_ON],
                    body,
                    affinity_of(request.headers, body),
                )
            )
        except Refused as error:
            return _json(error.status, error.body, error.headers)

    async def _answer(self, asked: Asked) -> Response:
        """Asks replicas until one of them has begun to answer."""
        lost, patient_until = 0, math.inf
        while lost < _ATTEMPTS:
            if lost:
                self._retries.inc()
                await asyncio.sleep(min(_FIRST_PAUSE_S * 2 ** (lost - 1), _LONGEST_PAUSE_S))
            pieces: Any = self._forward.remote(asked)
            try:
                head, first = await anext(pieces), await anext(pieces)
            except BackPressureError as error:
                # One that was let in is not sent away for it has lost its replica.
                if not lost or time.monotonic() > patient_until:
                    raise _too_many(error) from None
                await asyncio.sleep(_LONGEST_PAUSE_S)
            except TaskCancelledError:
                raise
            except (RayError, RayServeException) as error:
                logger.warning("A replica was lost before it answered: %s", _in_short(error))
                # It may only be out of reach, and go on with it.
                pieces.cancel()
                lost, patient_until = lost + 1, time.monotonic() + _PATIENCE_S
            except BaseException:
                pieces.cancel()
                raise
            else:
                return self._response(head, first, pieces, lost)
        raise Refused(
            "no replica answers; try again later", status=503, headers={"Retry-After": "5"}
        )

    def _response(self, head: Head, first: bytes, pieces: Any, retries: int) -> Response:
        body = self._stream(first, pieces) if head.streams else None
        response = (
            Response(first, head.status) if body is None else StreamingResponse(body, head.status)
        )
        for name, value in head.headers:
            response.headers.append(name, value)
        response.headers[RETRIES] = str(retries)
        return response

    async def _stream(self, first: bytes, pieces: Any) -> AsyncIterator[bytes]:
        """The events of an answer, or as many as there are and an error."""
        try:
            yield first
            async for events in pieces:
                yield events
        except (RayError, RayServeException) as error:
            logger.warning("A replica was lost in the middle of an answer: %s", _in_short(error))
            pieces.cancel()
            self._cut.inc()
            # Neither a reason of its end nor [DONE] follows.
            text = "the replica was lost before the answer was whole; send the request again"
            yield b"data: " + error_body(503, text) + b"\n\n"
        except BaseException:
            pieces.cancel()
            raise

    async def _metrics(self) -> Response:
        """Prometheus' text of all replicas; nothing where there is none."""
        try:
            called = self._model.broadcast("metrics")
            found = await called.results_async(timeout_s=_METRICS_S, return_exceptions=True)
        except (RayServeException, TimeoutError):
            found = []
        texts: dict[str, str] = dict(one for one in found if isinstance(one, tuple))
        return Response(merge(texts), media_type="text/plain; version=0.0.4; charset=utf-8")


def _too_many(error: BackPressureError) -> Refused:
    seconds = error.retry_after_s
    return Refused(
        "as many requests wait as may; try again later",
        status=error.status_code,
        headers={} if seconds is None else {"Retry-After": str(math.ceil(seconds))},
    )


def _json(status: int, body: bytes, headers: dict[str, str] | None = None) -> Response:
    return Response(body, status, headers, "application/json")


def _in_short(error: Exception) -> str:
    return str(error).strip().rpartition("\n")[2]
