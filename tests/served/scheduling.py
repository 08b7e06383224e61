"""MAX's scheduler around a served pipeline, in this process, with lists as queues."""

from __future__ import annotations

import asyncio
import queue
import time
from collections.abc import Callable, Sequence
from typing import Any

from max.pipelines.context import SamplingParams, TextContext
from max.pipelines.modeling.types import TextGenerationRequest
from max.pipelines.request import RequestID
from max.serve.scheduler.base import SchedulerProgress
from max.serve.scheduler.text_generation_scheduler import load_text_generation_scheduler
from max.serve.scheduler_result import SchedulerResult

from unispec.engine.served_config import Served
from unispec.pipelines.served.output import ServedOutput
from unispec.pipelines.served.pipeline import ServedPipeline

__all__ = ["SHORT", "Scheduled", "greedy", "request"]

SHORT = 40
"""Tokens of an answer where a test does not say how many."""


class ListQueue:
    """What the scheduler wants of a queue."""

    def __init__(self) -> None:
        self.items: list[Any] = []

    def put_nowait(self, item: Any) -> None:
        self.items.append(item)

    def get_nowait(self) -> Any:
        if not self.items:
            raise queue.Empty
        return self.items.pop(0)


def greedy(count: int = SHORT) -> SamplingParams:
    return SamplingParams(temperature=0, max_new_tokens=count, ignore_eos=True)


def request(
    tokens: Sequence[int] | str, params: SamplingParams, **fields: Any
) -> TextGenerationRequest:
    """As MAX's routes make it."""
    return TextGenerationRequest(
        request_id=RequestID(), model_name="m", prompt=tokens, sampling_params=params, **fields
    )


class Scheduled:
    """A pipeline that MAX's scheduler drives.

    Attributes:
        results: of each request all that was sent to the API process.
    """

    def __init__(self, served: Served, pipeline: ServedPipeline) -> None:
        self.served, self.pipeline = served, pipeline
        self._requests, self._responses, self._cancels = ListQueue(), ListQueue(), ListQueue()
        self.scheduler = load_text_generation_scheduler(
            self.pipeline,  # type: ignore[arg-type]
            self.served.pipeline_config,
            self._requests,
            self._responses,
            self._cancels,
            self.served.memory_plan,
        )
        self.results: dict[RequestID, list[SchedulerResult[Any]]] = {}

    def context(
        self, tokens: Sequence[int] | str, params: SamplingParams, **fields: Any
    ) -> TextContext:
        """A request on its way to the worker."""
        made = request(tokens, params, **fields)
        return asyncio.run(self.served.tokenizer.new_context(made))

    def add(self, context: TextContext) -> RequestID:
        """Sends a request; the scheduler alone keeps its context."""
        self._requests.put_nowait(context)
        self.results[context.request_id] = []
        return context.request_id

    def cancel(self, request_id: RequestID) -> None:
        self._cancels.put_nowait([request_id])

    def iterate(self) -> None:
        if self.scheduler.run_iteration() is SchedulerProgress.NO_PROGRESS:
            time.sleep(0.001)  # a grammar is compiled
        for sent in self._responses.items:
            for request_id, result in sent.items():
                self.results[request_id].append(result)
        self._responses.items.clear()

    def run(self, before: Callable[[int], None] = lambda iteration: None) -> None:
        """Until every request has its last result."""
        for iteration in range(10_000):
            if all(sent and sent[-1].is_done for sent in self.results.values()):
                return
            before(iteration)
            self.iterate()
        raise AssertionError("the scheduler does not come to an end")

    def preempt(self, request_id: RequestID) -> None:
        """As the scheduler does it where pages run out; between two iterations."""
        constructor: Any = self.scheduler.batch_constructor
        context = constructor.all_tg_reqs[request_id]
        constructor._return_to_request_queue(context, 0)

    def outputs(self, request_id: RequestID) -> list[ServedOutput]:
        return [sent.result for sent in self.results[request_id] if sent.result is not None]

    def answer(self, request_id: RequestID) -> list[int]:
        return [token for output in self.outputs(request_id) for token in output.tokens]

    def assert_left_empty(self) -> None:
        """No row, none kept, and every page free."""
        assert not self.pipeline.model.batch.rows
        assert len(self.pipeline._preempted) == 0
        self.pipeline.kv_manager.reset_prefix_cache()
        count = self.pipeline.kv_manager.block_count()
        assert count.free == count.total
