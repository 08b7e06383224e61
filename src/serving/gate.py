"""What every request passes, and the paths that are there before the model is."""

from __future__ import annotations

import hmac
import logging
import uuid
from collections.abc import Awaitable, Callable, Mapping
from importlib.metadata import version
from importlib.resources import files
from typing import Any, Final, Protocol, TypeAlias
from urllib.parse import urlsplit

from starlette.requests import ClientDisconnect, Request
from starlette.responses import HTMLResponse, Response
from starlette.types import Message, Receive, Scope, Send

from .refusal import Refused, error_body, shown, to_json
from .state import State

__all__ = ["Gate", "Handler", "Interface", "json_response"]

logger = logging.getLogger(__name__)

_JSON: Final = "application/json"

Handler: TypeAlias = Callable[[Request], Awaitable[Response]]
"""Answers a request, or raises `Refused`."""

_CLIENT_GONE: Final = 499
"""What nginx counts a request as whose client has left."""

_POLICY: Final = (
    "default-src 'none'; connect-src 'self'; img-src data:; style-src 'unsafe-inline';"
    " script-src 'unsafe-inline'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
"""The page loads nothing from elsewhere."""


class Interface(Protocol):
    """The paths that need the model."""

    def find(self, path: str) -> tuple[str, Handler] | None:
        """Method and handler of a path, if it is one of them."""
        ...

    def count(self, path: str, status: int) -> None:
        """Counts an answered request."""
        ...


class Gate:
    """Asks for the key, sends away what comes too early, and says in JSON what goes wrong.

    Args:
        api_key: what requests to `/v1` have to bring; None: nothing.
        page: whether there is a page at `/`.

    Attributes:
        interface: what answers once the model is there.
    """

    def __init__(self, state: State, *, api_key: str | None, page: bool) -> None:
        self._state = state
        self._key = None if api_key is None else api_key.encode()
        self.interface: Interface | None = None
        self._paths: dict[str, Handler] = {
            "/status": self._status,
            "/health": self._ready,
            "/health/ready": self._ready,
            "/health/live": self._alive,
            "/version": self._version,
        }
        if page:
            self._paths["/"] = self._page

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Passes a request on."""
        if scope["type"] != "http":
            return
        status, begun = 500, False
        request_id = uuid.uuid4().hex

        async def counted(message: Message) -> None:
            nonlocal status, begun
            if message["type"] == "http.response.start":
                status, begun = message["status"], True
                message["headers"] = [*message["headers"], (b"x-request-id", request_id.encode())]
            await send(message)

        try:
            response = await self._respond(scope, receive)
            await response(scope, receive, counted)
        except Refused as error:
            if not begun:
                refusal = Response(error.body, error.status, error.headers, _JSON)
                await refusal(scope, receive, counted)
        except ClientDisconnect:
            status = _CLIENT_GONE
        except Exception:
            logger.exception("Request %s failed:", request_id)
            if begun:
                raise
            text = f"the request failed; the server's log says more of {request_id}"
            await Response(error_body(500, text), 500, media_type=_JSON)(scope, receive, counted)
        finally:
            if self.interface is not None:
                self.interface.count(scope["path"], status)

    async def _respond(self, scope: Scope, receive: Receive) -> Response:
        path, asked = scope["path"], scope["method"]
        headers = dict(scope["headers"])
        if path.startswith("/v1/"):
            self._check_key(headers.get(b"authorization", b""))
            _check_origin(headers)
        if path.startswith("/v1/") or (path == "/metrics" and self.interface is None):
            self._state.check()
        if path in self._paths:
            method, handler = "GET", self._paths[path]
        else:
            found = None if self.interface is None else self.interface.find(path)
            if found is None:
                raise Refused(
                    f"{shown(path)} is not served; /v1/chat/completions, /v1/completions and"
                    " /v1/models are",
                    status=404,
                )
            method, handler = found
        # A server leaves the body of an answer to HEAD out.
        if asked != method and (asked, method) != ("HEAD", "GET"):
            raise Refused(
                f"{path} does not take {shown(asked)}; send {method}",
                status=405,
                headers={"Allow": method},
            )
        return await handler(Request(scope, receive))

    def _check_key(self, authorization: bytes) -> None:
        scheme, _, key = authorization.partition(b" ")
        if self._key is not None and not (
            scheme.lower() == b"bearer" and hmac.compare_digest(key.strip(), self._key)
        ):
            raise Refused(
                "the API key is missing or wrong; send the header Authorization: Bearer KEY",
                status=401,
                headers={"WWW-Authenticate": "Bearer"},
            )

    async def _status(self, request: Request) -> Response:
        """What runs, and how far it is."""
        state = self._state
        found = {"state": state.name, "phase": state.phase, **state.about}
        return json_response({**found, "version": version("unispec")})

    async def _ready(self, request: Request) -> Response:
        """Whether requests are answered; else 503 says why not."""
        self._state.check()
        return json_response({"status": "ready"})

    async def _alive(self, request: Request) -> Response:
        """Whether the server runs, ready or not."""
        return json_response({"status": self._state.name})

    async def _version(self, request: Request) -> Response:
        return json_response({"version": version("unispec")})

    async def _page(self, request: Request) -> Response:
        text = files(__package__).joinpath("page.html").read_text(encoding="utf-8")
        return HTMLResponse(text, headers={"Content-Security-Policy": _POLICY})


def json_response(value: Any) -> Response:
    """A value as an answer with status 200."""
    return Response(to_json(value), media_type=_JSON)


def _check_origin(headers: Mapping[bytes, bytes]) -> None:
    """Refuses what a page of another site makes a browser send.

    Raises:
        Refused: with 403.
    """
    origin = headers.get(b"origin")
    if origin is None:
        return
    hosts = {headers.get(name, b"").decode("latin-1") for name in (b"host", b"x-forwarded-host")}
    if urlsplit(origin.decode("latin-1")).netloc not in hosts:
        raise Refused(
            f"a page of {shown(origin.decode('latin-1'))} asks, which is another site; send the"
            " request from a program",
            status=403,
        )
