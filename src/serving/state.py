"""How far a server is: starting, ready, stopping."""

from __future__ import annotations

import time
from typing import Literal, TypeAlias

from .max_server import ModelWorker
from .refusal import Refused

__all__ = ["State"]

_Name: TypeAlias = Literal["starting", "ready", "stopping"]


class State:
    """Changed by the server, looked at by every request.

    Attributes:
        name: in one word.
        phase: what it is doing, in words.
        created: seconds since 1970, when the server began.
    """

    def __init__(self) -> None:
        self.name: _Name = "starting"
        self.phase = "starting the model's process"
        self.created = int(time.time())
        self._worker: ModelWorker | None = None

    @property
    def worker(self) -> ModelWorker:
        """The process that answers; `check` has passed."""
        assert self._worker is not None
        return self._worker

    def begin(self, worker: ModelWorker) -> None:
        """Lets requests in."""
        self._worker = worker
        self.name, self.phase = "ready", "answering requests"

    def stop(self) -> None:
        """Lets no further request in."""
        self.name, self.phase = "stopping", "finishing the answers that have begun"

    def check(self) -> None:
        """Refuses what cannot be answered now.

        Raises:
            Refused: with 503; says what the server is doing.
        """
        if self.name == "starting":
            raise Refused(
                f"the server is starting ({self.phase}); try again in a few seconds",
                status=503,
                headers={"Retry-After": "5"},
            )
        if self.name == "stopping":
            raise Refused("the server is stopping; send the request to another", status=503)
