"""What a client is told of a request that is not answered."""

from __future__ import annotations

import json
from collections.abc import Mapping
from reprlib import Repr
from types import MappingProxyType
from typing import Any, Final

__all__ = ["Refused", "error_body", "shown", "to_json"]

_TYPES: Final[Mapping[int, str]] = MappingProxyType(
    {401: "authentication_error", 429: "rate_limit_error"}
)

_SHOWN: Final = Repr()
_SHOWN.maxstring = _SHOWN.maxother = _SHOWN.maxlong = 60


class Refused(Exception):
    """A request that gets an error as its answer.

    Args:
        message: one sentence that names the value and the fix.
        param: the parameter that is wrong, if it is one.
        status: of HTTP.
        headers: of the answer.
    """

    def __init__(
        self,
        message: str,
        *,
        param: str | None = None,
        status: int = 400,
        headers: Mapping[str, str] = MappingProxyType({}),
    ) -> None:
        super().__init__(message)
        self.param = param
        self.status = status
        self.headers = dict(headers)

    @property
    def body(self) -> bytes:
        """JSON in OpenAI's form."""
        return error_body(self.status, str(self), self.param)


def error_body(status: int, message: str, param: str | None = None) -> bytes:
    """An error as OpenAI's clients read it, in JSON."""
    kind = _TYPES.get(status, "invalid_request_error" if status < 500 else "api_error")
    error = {"message": message, "type": kind, "param": param, "code": status}
    return to_json({"error": error})


def to_json(value: Any) -> bytes:
    """Compact JSON in ASCII, which holds what is no valid UTF-8 as escapes."""
    return json.dumps(value, allow_nan=False, separators=(",", ":")).encode("ascii")


def shown(value: Any) -> str:
    """A value as an error shows it: short, as JSON writes it where that is short."""
    if value is None or isinstance(value, bool):
        return json.dumps(value)
    return _SHOWN.repr(value)
