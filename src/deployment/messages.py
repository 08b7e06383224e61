"""What an ingress and a replica say to each other."""

from __future__ import annotations

from dataclasses import dataclass

from .affinity import Affinity

__all__ = ["Asked", "Head", "ServerLost"]


@dataclass(frozen=True)
class Asked:
    """A client's request, as it came."""

    method: str
    """Of HTTP."""
    path: str
    """With its query, without the prefix of the application."""
    headers: list[tuple[str, str]]
    """Those that concern the server."""
    body: bytes
    """As the client has sent it."""
    affinity: Affinity
    """What its replica is chosen by."""


@dataclass(frozen=True)
class Head:
    """What an answer begins with; its body, or the events of a stream, come after it."""

    status: int
    """Of HTTP."""
    headers: list[tuple[str, str]]
    """Those that concern the client."""

    @property
    def streams(self) -> bool:
        """Whether server-sent events follow, not a whole body."""
        return any(
            name.lower() == "content-type" and value.startswith("text/event-stream")
            for name, value in self.headers
        )


class ServerLost(Exception):
    """A replica's server has ended, or is about to: another one may answer."""
