"""The paths that need the model: completions, models and metrics."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import aclosing
from http.client import HTTPException
from typing import Any, Final
from urllib.request import ProxyHandler, build_opener

from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.types import Message, Receive, Scope, Send

from .answering import Piece, Usage, answer
from .asked import read_body
from .body import whole_body
from .formats import Form, form_of
from .frontend import Frontend
from .gate import Handler, json_response
from .max_server import METRICS, ModelWorker
from .parameters import CHAT, TEXT
from .refusal import Refused, error_body, shown, to_json
from .state import State
from .statistics import Statistics

__all__ = ["ModelInterface"]

logger = logging.getLogger(__name__)

_BODY_S: Final = 60
"""How long a client may take to send its request."""
_MODELS: Final = "/v1/models"


class ModelInterface:
    """Handlers of the paths that need the model.

    Args:
        metrics_url: of MAX's own metrics.
    """

    def __init__(
        self,
        frontend: Frontend,
        worker: ModelWorker,
        state: State,
        statistics: Statistics,
        metrics_url: str,
    ) -> None:
        self._frontend = frontend
        self._worker = worker
        self._state = state
        self._statistics = statistics
        self._metrics_url = metrics_url
        self._paths: dict[str, tuple[str, Handler]] = {
            CHAT: ("POST", self._complete),
            TEXT: ("POST", self._complete),
            _MODELS: ("GET", self._list_models),
            "/metrics": ("GET", self._metrics),
        }

    def find(self, path: str) -> tuple[str, Handler] | None:
        """Method and handler of a path, if it is one of them."""
        if path.startswith(f"{_MODELS}/") and len(path) > len(_MODELS) + 1:
            return "GET", self._show_model
        return self._paths.get(path)

    def count(self, path: str, status: int) -> None:
        """Counts an answered request, under a name that clients cannot choose."""
        if path in (CHAT, TEXT, _MODELS):
            METRICS.request_count(status, path)

    async def _complete(self, request: Request) -> Response:
        """Answers a conversation, or prompts."""
        began = time.monotonic()
        path = request.scope["path"]
        raw = await self._body(request)
        frontend = self._frontend
        asked = await frontend.beside(read_body, raw, path)
        places = self._statistics.queue(asked.rows)
        try:
            prompts = await frontend.choices(asked)
        except BaseException:
            places.leave()
            raise
        METRICS.input_time((time.monotonic() - began) * 1e3)
        form = form_of(asked, frontend.model_name, prompts, frontend)
        usage = Usage()
        pieces = answer(self._worker, asked, prompts, usage, places)

        async def end() -> None:
            await pieces.aclose()
            places.leave()
            METRICS.input_tokens(usage.prompt_tokens)
            METRICS.request_time((time.monotonic() - began) * 1e3, path)

        return _Answer(form, pieces, usage, end)

    async def _body(self, request: Request) -> bytes:
        """What a client sends, which takes no longer than it may and no memory beyond that."""
        reading = asyncio.ensure_future(whole_body(request))
        stopping = asyncio.ensure_future(self._state.stopping.wait())
        try:
            await asyncio.wait(
                {reading, stopping}, timeout=_BODY_S, return_when=asyncio.FIRST_COMPLETED
            )
            if reading.done():
                return reading.result()
            self._state.check()
            raise Refused(f"the request did not arrive in {_BODY_S} seconds", status=408)
        finally:
            for task in (reading, stopping):
                task.cancel()
            await asyncio.gather(reading, stopping, return_exceptions=True)

    async def _list_models(self, request: Request) -> Response:
        """The served model, as OpenAI lists it."""
        return json_response({"object": "list", "data": [self._model()]})

    async def _show_model(self, request: Request) -> Response:
        """Likewise, by its name."""
        name = request.scope["path"].removeprefix(f"{_MODELS}/")
        if name != self._frontend.model_name:
            raise Refused(
                f"the model {shown(name)} is not served here; use {self._frontend.model_name!r}",
                status=404,
            )
        return json_response(self._model())

    def _model(self) -> dict[str, Any]:
        return {
            "id": self._frontend.model_name,
            "object": "model",
            "created": self._state.created,
            "owned_by": "unispec",
            "max_model_len": self._frontend.engine.max_length,
        }

    async def _metrics(self, request: Request) -> Response:
        """Prometheus' text: MAX's metrics, then vLLM's counters of drafts."""
        of_max = await asyncio.to_thread(_get, self._metrics_url)
        text = of_max + self._statistics.exposition()
        # A scraper that asks for another format would lose the colons of vLLM's names.
        return Response(text, media_type="text/plain; version=0.0.4; charset=utf-8")


def _get(url: str) -> bytes:
    """What is at a URL of this machine, never by a proxy; nothing if nobody answers."""
    try:
        with build_opener(ProxyHandler({})).open(url, timeout=5) as answer:
            return bytes(answer.read())
    except (OSError, HTTPException):
        return b""


class _Answer(Response):
    """Sends an answer as it comes, and takes its request out when the client has gone."""

    def __init__(
        self,
        form: Form,
        pieces: AsyncGenerator[Piece, None],
        usage: Usage,
        end: Callable[[], Awaitable[None]],
    ) -> None:
        super().__init__()
        self._form, self._pieces, self._usage, self._end = form, pieces, usage, end
        self._begun = False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Sends it; raises `ClientDisconnect` if there is nobody to read it."""
        sending = asyncio.create_task(self._send(send))
        leaving = asyncio.create_task(_until_gone(receive))
        try:
            await asyncio.wait({sending, leaving}, return_when=asyncio.FIRST_COMPLETED)
            if not sending.done():
                raise ClientDisconnect
            await sending
        except asyncio.CancelledError:
            # The server waits no longer for this answer.
            sending.cancel()
            await asyncio.gather(sending, return_exceptions=True)
            await self._break_off(send)
        finally:
            for task in (sending, leaving):
                task.cancel()
            await asyncio.gather(sending, leaving, return_exceptions=True)
            await self._end()

    async def _break_off(self, send: Send) -> None:
        """Says that the answer is not whole."""
        error = Refused("the server has stopped before the answer was whole", status=503)
        if not self._begun:
            raise error
        await _write(send, error.body)
        await send({"type": "http.response.body", "body": b""})

    async def _send(self, send: Send) -> None:
        if self._form.asked.stream:
            await self._send_stream(send)
            return
        async with aclosing(self._pieces) as pieces:
            async for piece in pieces:
                self._form.add(piece)
        whole = json_response(self._form.whole(self._usage))
        await whole({"type": "http"}, _nothing, send)

    async def _send_stream(self, send: Send) -> None:
        # What is refused at once still gets a status.
        first = await anext(self._pieces, None)
        headers = [
            (b"content-type", b"text/event-stream; charset=utf-8"),
            (b"cache-control", b"no-cache"),
            (b"x-accel-buffering", b"no"),
        ]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        self._begun = True

        async def event(value: Any) -> None:
            await _write(send, to_json(value))

        try:
            for chunk in self._form.first_chunks():
                await event(chunk)
            if first is not None:
                await event(self._form.chunk(first))
            async for piece in self._pieces:
                await event(self._form.chunk(piece))
            if self._form.asked.include_usage:
                await event(self._form.usage_chunk(self._usage))
            await _write(send, b"[DONE]")
        except Exception as error:
            # No answer that looks whole: neither a reason of its end nor [DONE] follows.
            await _write(send, _body_of(error))
        await send({"type": "http.response.body", "body": b""})


def _body_of(error: Exception) -> bytes:
    """What a client is told in the middle of a stream."""
    if isinstance(error, Refused):
        return error.body
    logger.error("A stream failed:", exc_info=error)
    return error_body(500, "the request failed; the server's log says more")


async def _write(send: Send, data: bytes) -> None:
    await send(
        {"type": "http.response.body", "body": b"data: " + data + b"\n\n", "more_body": True}
    )


async def _until_gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def _nothing() -> Message:
    return {"type": "http.disconnect"}
