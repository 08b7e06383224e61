"""The interface that clients talk to."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import aclosing
from importlib.metadata import version
from importlib.resources import files
from pathlib import Path
from typing import Any, Final, TypeAlias
from urllib.request import urlopen

from starlette.requests import ClientDisconnect, Request
from starlette.responses import HTMLResponse, Response
from starlette.types import Message, Receive, Scope, Send

from .answering import Piece, Usage, answer
from .asked import read_body
from .formats import Form, form_of
from .frontend import Frontend
from .gate import Gate
from .max_server import METRICS
from .parameters import CHAT, TEXT, shown
from .refusal import Refused, to_json
from .state import State
from .statistics import Statistics

__all__ = ["make_app"]

_MAX_BYTES: Final = 16 << 20
_JSON: Final = "application/json"
_MODELS: Final = "/v1/models/"

_Handler: TypeAlias = Callable[[Request], Awaitable[Response]]


class App:
    """Handlers of all paths.

    Args:
        metrics_url: of MAX's own metrics.
    """

    def __init__(
        self, frontend: Frontend, state: State, statistics: Statistics, metrics_url: str
    ) -> None:
        self.frontend = frontend
        self.state = state
        self.statistics = statistics
        self.metrics_url = metrics_url

    async def complete(self, request: Request) -> Response:
        """Answers a conversation, or prompts."""
        began = time.monotonic()
        path = request.scope["path"]
        asked = read_body(await _body(request), path)
        prompts = await self.frontend.choices(asked)
        METRICS.input_time((time.monotonic() - began) * 1e3)
        ids = [list(map(int, choices[0].context.tokens.prompt)) for choices in prompts]
        form = form_of(asked, self.frontend.model_name, ids, self.frontend.token_text)
        usage = Usage()
        pieces = answer(self.state.worker, prompts, usage, self.statistics)

        async def end() -> None:
            await pieces.aclose()
            METRICS.input_tokens(usage.prompt_tokens)
            METRICS.request_time((time.monotonic() - began) * 1e3, path)

        return _Answer(form, pieces, usage, end)

    async def models(self, request: Request) -> Response:
        """The served model, as OpenAI lists it."""
        return _json({"object": "list", "data": [self._model()]})

    async def model(self, request: Request) -> Response:
        """Likewise, by its name."""
        name = request.scope["path"].removeprefix(_MODELS)
        if name != self.frontend.model_name:
            raise Refused(
                f"the model {shown(name)} is not served here; use {self.frontend.model_name!r}",
                status=404,
            )
        return _json(self._model())

    async def status(self, request: Request) -> Response:
        """What runs, and how far it is."""
        config = self.frontend.config
        return _json(
            {
                "state": self.state.name,
                "phase": self.state.phase,
                "model": self.frontend.model_name,
                "target": _last_part(config.model),
                "draft": _last_part(config.draft_model),
                "speculative_method": config.speculative_method,
                "num_speculative_tokens": self.frontend.engine.max_speculative_tokens or None,
                "max_length": self.frontend.engine.max_length,
                "max_batch_size": config.max_batch_size,
                "version": version("unispec"),
            }
        )

    async def ready(self, request: Request) -> Response:
        """Whether requests are answered; else 503 says why not."""
        self.state.check()
        return _json({"status": "ready"})

    async def alive(self, request: Request) -> Response:
        """Whether the server runs, ready or not."""
        return _json({"status": self.state.name})

    async def metrics(self, request: Request) -> Response:
        """Prometheus' text: MAX's metrics, then vLLM's counters of drafts."""
        try:
            of_max = await asyncio.to_thread(_get, self.metrics_url)
        except OSError:  # not there before the worker is
            of_max = b""
        text = of_max + self.statistics.exposition()
        return Response(text, media_type="text/plain; version=0.0.4; charset=utf-8")

    async def version(self, request: Request) -> Response:
        """Of unispec."""
        return _json({"version": version("unispec")})

    async def page(self, request: Request) -> Response:
        """A page to try the model."""
        text = files(__package__).joinpath("page.html").read_text(encoding="utf-8")
        return HTMLResponse(text, headers={"Content-Security-Policy": _POLICY})

    def _model(self) -> dict[str, Any]:
        return {
            "id": self.frontend.model_name,
            "object": "model",
            "created": self.state.created,
            "owned_by": "unispec",
            "max_model_len": self.frontend.engine.max_length,
        }


_POLICY: Final = (
    "default-src 'none'; connect-src 'self'; img-src data:; style-src 'unsafe-inline';"
    " script-src 'unsafe-inline'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
"""The page loads nothing from elsewhere."""


def make_app(app: App, *, api_key: str | None, page: bool) -> Gate:
    """Everything that is served, behind its gate.

    Args:
        api_key: what requests to `/v1` have to bring; None: nothing.
        page: whether there is a page at `/`.
    """
    paths: dict[str, tuple[str, _Handler]] = {
        CHAT: ("POST", app.complete),
        TEXT: ("POST", app.complete),
        "/v1/models": ("GET", app.models),
        "/status": ("GET", app.status),
        "/health": ("GET", app.ready),
        "/health/ready": ("GET", app.ready),
        "/health/live": ("GET", app.alive),
        "/metrics": ("GET", app.metrics),
        "/version": ("GET", app.version),
    }
    if page:
        paths["/"] = ("GET", app.page)

    async def dispatch(scope: Scope, receive: Receive, send: Send) -> None:
        path, asked = scope["path"], scope["method"]
        is_model = path.startswith(_MODELS) and len(path) > len(_MODELS)
        method, handler = ("GET", app.model) if is_model else paths.get(path, ("", _missing))
        # A server leaves the body of an answer to HEAD out.
        if method and asked != method and (asked, method) != ("HEAD", "GET"):
            message = f"{path} does not take {shown(asked)}; send {method}"
            raise Refused(message, status=405, headers={"Allow": method})
        response = await handler(Request(scope, receive))
        await response(scope, receive, send)

    return Gate(dispatch, app.state, api_key)


def _last_part(model: str | None) -> str | None:
    """A model's name without the folders of this machine before it."""
    return Path(model).name if model is not None and Path(model).exists() else model


async def _missing(request: Request) -> Response:
    path = shown(request.scope["path"])
    raise Refused(f"{path} is not served; {CHAT}, {TEXT} and /v1/models are", status=404)


async def _body(request: Request) -> bytes:
    parts, size = [], 0
    async for part in request.stream():
        size += len(part)
        if size > _MAX_BYTES:
            raise Refused(f"the body is larger than {_MAX_BYTES} bytes; send less", status=413)
        parts.append(part)
    return b"".join(parts)


def _json(value: Any) -> Response:
    return Response(to_json(value), media_type=_JSON)


def _get(url: str) -> bytes:
    with urlopen(url, timeout=5) as answer:
        return bytes(answer.read())


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

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Sends it; raises `ClientDisconnect` if there is nobody to read it."""
        sending = asyncio.create_task(self._send(send))
        leaving = asyncio.create_task(_until_gone(receive))
        try:
            await asyncio.wait({sending, leaving}, return_when=asyncio.FIRST_COMPLETED)
            if not sending.done():
                raise ClientDisconnect
            await sending
        finally:
            for task in (sending, leaving):
                task.cancel()
            await asyncio.gather(sending, leaving, return_exceptions=True)
            await self._end()

    async def _send(self, send: Send) -> None:
        if self._form.asked.stream:
            await self._send_stream(send)
            return
        async with aclosing(self._pieces) as pieces:
            async for piece in pieces:
                self._form.add(piece)
        await Response(to_json(self._form.whole(self._usage)), media_type=_JSON)(
            {"type": "http"}, _nothing, send
        )

    async def _send_stream(self, send: Send) -> None:
        # What is refused at once still gets a status.
        first = await anext(self._pieces, None)
        headers = [
            (b"content-type", b"text/event-stream; charset=utf-8"),
            (b"cache-control", b"no-cache"),
        ]
        await send({"type": "http.response.start", "status": 200, "headers": headers})

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
        except Refused as error:
            # No answer that looks whole: neither a reason of its end nor [DONE] follows.
            await _write(send, error.body)
        await send({"type": "http.response.body", "body": b""})


async def _write(send: Send, data: bytes) -> None:
    await send(
        {"type": "http.response.body", "body": b"data: " + data + b"\n\n", "more_body": True}
    )


async def _until_gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def _nothing() -> Message:
    return {"type": "http.disconnect"}
