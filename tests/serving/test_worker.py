"""What the server does around MAX's worker, with a stand-in for the way there."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from typing import Any

import numpy as np
import pytest
from max.pipelines.context import TextContext, TokenBuffer

from unispec.pipelines.served.context import ServedContext
from unispec.serving.max_server import ModelWorker, WorkerEnded


class Deaf:
    """Forgets cancellations until it hears one more than `ignored`."""

    def __init__(self, ignored: int) -> None:
        self.ignored = ignored
        self.heard = 0
        self.pending_out_queues: dict[Any, asyncio.Queue[Any]] = {}

    def note_awaiting_admission(self, change: int) -> None:
        pass

    async def stream(self, request_id: Any, context: Any) -> AsyncGenerator[Any, None]:
        queue = self.pending_out_queues[request_id] = asyncio.Queue()

        async def outputs() -> AsyncGenerator[Any, None]:
            await queue.get()
            return
            yield

        return outputs()

    def cancel(self, request_id: Any) -> None:
        self.heard += 1
        if self.heard > self.ignored:
            self.pending_out_queues[request_id].put_nowait(None)


def context() -> ServedContext:
    return ServedContext.of(TextContext(tokens=TokenBuffer(np.array([5])), max_length=9))


def test_a_request_is_cancelled_until_the_worker_has_heard_it() -> None:
    async def leave() -> int:
        proxy = Deaf(ignored=2)
        source = await ModelWorker(proxy).stream(context())
        reading = asyncio.ensure_future(anext(source))
        await asyncio.sleep(0)
        reading.cancel()
        await asyncio.sleep(1)
        return proxy.heard

    assert asyncio.run(leave()) == 3


def test_who_waits_hears_that_the_worker_has_ended() -> None:
    async def wait() -> None:
        worker = ModelWorker(Deaf(ignored=0))
        source = await worker.stream(context())
        reading = asyncio.ensure_future(anext(source))
        await asyncio.sleep(0.01)
        await worker.close()
        with pytest.raises(WorkerEnded):
            await reading
        with pytest.raises(WorkerEnded):
            await worker.stream(context())

    asyncio.run(asyncio.wait_for(wait(), 10))
