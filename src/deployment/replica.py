"""A replica of the model: one `unispec serve`, and bytes to and from it."""

from __future__ import annotations

import asyncio
import logging
import os
import threading
import time
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from typing import Final

import aiohttp
import ray
from ray import serve

from .messages import Asked, Head, ServerLost
from .server import Server

__all__ = ["REPLICA", "Replica", "processors_of", "whole_events"]

logger = logging.getLogger("ray.serve")

REPLICA: Final = "x-unispec-replica"
"""A header of answers: the name of the replica, as Ray Serve's logs and the metrics have it."""

_METRICS_S: Final = 3
"""Below the time that the ingress has for all replicas."""
_LAST_WORDS_S: Final = 1
"""How long answers have to say that the server has ended."""
_ITS_OWN: Final = frozenset(
    {"connection", "content-length", "date", "keep-alive", "transfer-encoding", "x-request-id"}
)
"""Headers of one connection, and the server's name of a request: Ray Serve has another."""


class Replica:
    """Runs `unispec serve` on this replica's processors or GPU.

    Where the server ends by itself the replica does so too, and Ray Serve starts another.

    Args:
        arguments: of `unispec serve`.

    Raises:
        ServerLost: it has ended before it answered; says its last line.
    """

    def __init__(self, arguments: Sequence[str]) -> None:
        context = serve.get_replica_context()
        self._name = context.replica_tag
        given = ray.get_runtime_context().get_assigned_resources()
        # With a GPU the processors are for many processes that hardly compute.
        count = 0 if "GPU" in given else int(given.get("CPU", 0))
        usable = sorted(os.sched_getaffinity(0))
        self._server = Server(arguments, processors_of(usable, count, context.rank.local_rank))
        self._http = aiohttp.ClientSession(
            # Of the length of an answer nothing is known, nor of how many there are.
            timeout=aiohttp.ClientTimeout(total=None),
            connector=aiohttp.TCPConnector(limit=0),
            auto_decompress=False,
        )
        self._stopping = threading.Event()
        threading.Thread(target=self._end_with_server, daemon=True).start()

    def _end_with_server(self) -> None:
        status = self._server.wait()
        if not self._stopping.is_set():
            logger.error("unispec serve has ended with status %s; so does its replica.", status)
            time.sleep(_LAST_WORDS_S)
            os._exit(1)

    async def check_health(self) -> None:
        """Called by Ray Serve.

        Raises:
            ServerLost: the server has ended, or answers nothing.
        """
        if not await asyncio.to_thread(self._server.answers):
            raise ServerLost("unispec serve does not answer")

    async def forward(self, asked: Asked) -> AsyncGenerator[Head | bytes, None]:
        """Passes a request on; closing or cancelling it takes the request out.

        Yields:
            The head of the answer, then its whole body, or as many events at a time as there are.

        Raises:
            ServerLost: the answer does not come, or not as a whole.
        """
        try:
            async with self._http.request(
                asked.method, self._server.url + asked.path, data=asked.body, headers=asked.headers
            ) as answer:
                if answer.status == 503:
                    # It is about to end.
                    raise ServerLost(await answer.text())
                headers = [
                    pair for pair in answer.headers.items() if pair[0].lower() not in _ITS_OWN
                ]
                head = Head(answer.status, [*headers, (REPLICA, self._name)])
                yield head
                if head.streams:
                    async for events in whole_events(answer.content.iter_any()):
                        yield events
                else:
                    yield await answer.read()
        except aiohttp.ClientError as error:
            raise ServerLost(f"unispec serve has ended: {error!r}") from None

    async def metrics(self) -> tuple[str, str]:
        """This replica's name, and what it exports, as Prometheus reads it; nothing if slow."""
        try:
            async with self._http.get(
                f"{self._server.url}/metrics", timeout=aiohttp.ClientTimeout(total=_METRICS_S)
            ) as answer:
                return self._name, await answer.text()
        except (aiohttp.ClientError, asyncio.TimeoutError):
            return self._name, ""

    async def __del__(self) -> None:
        """Called by Ray Serve once no request is left."""
        self._stopping.set()
        await self._http.close()
        await asyncio.to_thread(self._server.stop)


async def whole_events(pieces: AsyncIterator[bytes]) -> AsyncGenerator[bytes, None]:
    """A stream of server-sent events, cut between two of them only."""
    rest = b""
    async for piece in pieces:
        whole, between, rest = (rest + piece).rpartition(b"\n\n")
        if between:
            yield whole + between
    if rest:
        yield rest


def processors_of(usable: Sequence[int], count: int, rank: int) -> list[int]:
    """Processors of a replica, so that those of one machine do not share any.

    Args:
        usable: all that there are.
        count: how many it has been given; 0: it takes any.
        rank: its place among the replicas of this machine, from 0.
    """
    if not 0 < count < len(usable):
        return []
    start = rank * count % (len(usable) - len(usable) % count)
    return list(usable[start : start + count])
