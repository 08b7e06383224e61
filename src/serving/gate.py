"""What every request passes before and behind its handler."""

from __future__ import annotations

import hmac
import logging
import re
import uuid
from collections.abc import MutableMapping
from typing import Any, Final

from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from .max_server import METRICS
from .refusal import Refused, error_body
from .state import State

__all__ = ["Gate"]

logger = logging.getLogger(__name__)

_CLIENT_GONE: Final = 499
"""What nginx counts a request as whose client has left."""
_COUNTED: Final = re.compile(r"/v1/[a-z/]+")


class Gate:
    """Asks for the key, waits for nobody, and answers whatever goes wrong in JSON.

    Args:
        app: what is behind it.
        api_key: what requests to `/v1` have to bring; None: nothing.
    """

    def __init__(self, app: ASGIApp, state: State, api_key: str | None) -> None:
        self._app = app
        self._state = state
        self._authorization = None if api_key is None else f"Bearer {api_key}".encode()

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
            try:
                self._check(scope)
                await self._app(scope, receive, counted)
            except Refused as error:
                if not begun:
                    await _answer(counted, error.status, error.body, error.headers)
            except ClientDisconnect:
                status = _CLIENT_GONE
            except Exception:
                logger.exception("Request %s failed:", request_id)
                if begun:
                    raise
                message = f"the request failed; the server's log says more of {request_id}"
                await _answer(counted, 500, error_body(500, message), {})
        finally:
            if _COUNTED.fullmatch(scope["path"]):
                METRICS.request_count(status, scope["path"])

    def _check(self, scope: Scope) -> None:
        if not scope["path"].startswith("/v1/"):
            return
        if self._authorization is not None:
            given = dict(scope["headers"]).get(b"authorization", b"")
            if not hmac.compare_digest(given, self._authorization):
                raise Refused(
                    "the API key is missing or wrong; send the header Authorization: Bearer KEY",
                    status=401,
                    headers={"WWW-Authenticate": "Bearer"},
                )
        self._state.check()


async def _answer(
    send: Send, status: int, body: bytes, headers: MutableMapping[str, str] | dict[str, Any]
) -> None:
    own = {"content-type": "application/json", "content-length": str(len(body)), **headers}
    pairs = [(name.lower().encode(), value.encode()) for name, value in own.items()]
    await send({"type": "http.response.start", "status": status, "headers": pairs})
    await send({"type": "http.response.body", "body": body})
