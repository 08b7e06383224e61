"""One batch of requests from its first step to its last answer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from time import perf_counter

from max.pipelines.context import TextContext
from max.pipelines.modeling.types import TextGenerationInputs

from .pipeline import SpeculativePipeline
from .requests import Report, Result
from .scheduler import Scheduler
from .text_stream import TextStream

__all__ = ["Run"]


class Run:
    """One call of `generate`."""

    def __init__(
        self,
        pipeline: SpeculativePipeline,
        scheduler: Scheduler,
        contexts: list[TextContext],
        streams: list[TextStream],
        on_text: Callable[[int, str], None],
        on_finish: Callable[[int], None],
    ) -> None:
        self._pipeline = pipeline
        self._scheduler = scheduler
        self._contexts = contexts
        self._streams = streams
        self._on_text = on_text
        self._on_finish = on_finish
        self._results = [Result() for _ in contexts]
        self._indices = {context.request_id: at for at, context in enumerate(contexts)}

    def finish_all(self) -> Report:
        """Steps until every request is answered; on an error nothing stays behind."""
        start = perf_counter()
        first_token = 0.0
        unfinished = dict(self._indices)
        try:
            for context in self._contexts:
                self._scheduler.add(context)
            while batch := self._scheduler.next_batch():
                outputs = self._pipeline.execute(TextGenerationInputs(batches=[batch]))
                for context in batch:
                    tokens = outputs[context.request_id].tokens
                    if tokens and not first_token:
                        first_token = perf_counter() - start
                    if self._take(context, tokens):
                        del unfinished[context.request_id]
        finally:
            for index in unfinished.values():
                self._end(self._contexts[index])
        wall = perf_counter() - start
        metrics = self._pipeline.metrics
        return Report(
            results=self._results,
            acceptance_per_position=metrics.acceptance_per_position,
            mean_acceptance_length=metrics.mean_acceptance_length,
            tokens_per_second=sum(len(result.token_ids) for result in self._results) / wall,
            time_to_first_token_s=first_token,
            step_time_s=metrics.step_time_s,
            graph_time_s=metrics.graph_time_s,
            steps=len(metrics.step_times_s),
        )

    def _take(self, context: TextContext, tokens: Sequence[int]) -> bool:
        """Adds a step's tokens to the answer; returns whether it is complete."""
        index = self._indices[context.request_id]
        result, stream = self._results[index], self._streams[index]
        new = ""
        for token in tokens:
            result.token_ids.append(token)
            new += stream.push(token)
            if stream.stopped:
                break
        done = stream.stopped or context.is_done
        if done:
            new += stream.finish()
        if new:
            self._on_text(index, new)
        if not done:
            return False
        row = self._pipeline.model.batch.row(context)
        result.text = stream.text
        result.drafted, result.accepted = row.drafted, row.accepted
        ended = stream.stopped or context.status.name == "END_OF_SEQUENCE"
        result.finish_reason = "stop" if ended else "length"
        self._end(context)
        self._on_finish(index)
        return True

    def _end(self, context: TextContext) -> None:
        self._scheduler.finish(context)
        self._pipeline.release(context.request_id)
