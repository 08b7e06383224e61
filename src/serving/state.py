"""How far a server is: starting, ready, stopping."""

from __future__ import annotations

import asyncio
import time
from typing import Any, Literal, TypeAlias

from .refusal import Refused

__all__ = ["State"]

_Name: TypeAlias = Literal["starting", "ready", "stopping"]


class State:
    """Changed by the server, looked at by every request.

    Args:
        about: what is known of the model before it is read: its name, draft and limits.

    Attributes:
        name: in one word.
        phase: what it is doing, in words.
        about: what runs.
        created: seconds since 1970, when the server began.
        stopping: set when no further request is taken.
    """

    def __init__(self, about: dict[str, Any]) -> None:
        self.name: _Name = "starting"
        self.phase = "starting MAX"
        self.about = about
        self.created = int(time.time())
        self.stopping = asyncio.Event()

    def begin(self) -> None:
        """Lets requests in."""
        if self.name == "starting":
            self.name, self.phase = "ready", "answering requests"

    def stop(self) -> None:
        """Lets no further request in."""
        self.name, self.phase = "stopping", "finishing the answers that have begun"
        self.stopping.set()

    def check(self) -> None:
        """Refuses what cannot be answered now.

        Raises:
            Refused: with 503; says what the server is doing.
        """
        if self.name == "starting":
            raise Refused(
                f"the server is starting ({self.phase}); try again later",
                status=503,
                headers={"Retry-After": "5"},
            )
        if self.name == "stopping":
            raise Refused("the server is stopping; send the request to another", status=503)
