"""The body of a request, which may not be larger than one may be."""

from __future__ import annotations

from typing import Final

from starlette.requests import Request

from .refusal import Refused

__all__ = ["whole_body"]

_MAX_BYTES: Final = 16 << 20


async def whole_body(request: Request) -> bytes:
    """Reads it, at most 16 MiB.

    Raises:
        Refused: it is larger.
    """
    parts, size = [], 0
    async for part in request.stream():
        size += len(part)
        if size > _MAX_BYTES:
            raise Refused(f"the body is larger than {_MAX_BYTES} bytes; send less", status=413)
        parts.append(part)
    return b"".join(parts)
