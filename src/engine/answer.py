"""One request on its way: what the batch runs of it, and its answer so far."""

from __future__ import annotations

from collections import deque
from collections.abc import Collection
from dataclasses import dataclass, field
from itertools import islice

from max.pipelines.context import (
    GenerationStatus,
    LogProbabilities,
    TextContext,
    TextGenerationOutput,
)
from max.pipelines.request import RequestID

from unispec.pipelines.runtime.metrics import StepTimes
from unispec.pipelines.runtime.rows import Row

from .requests import Output, Result, TokenLogprobs
from .text_stream import TextStream

__all__ = ["Answer", "Outbox"]


@dataclass(eq=False)
class Outbox:
    """Where the outputs of one caller's requests wait until it takes them.

    The caller and the thread of the steps use it without a lock. A request is counted by what
    is there of it, so an interrupt of a caller loses at most what it was just taking.
    """

    goes_on: bool
    """Whether steps follow each other while a request of this caller is not answered; else
    only those are run that are asked for."""
    open: dict[RequestID, Answer] = field(default_factory=dict)
    """Requests whose last output was not given yet. The caller puts them in, the thread takes
    them out."""
    outputs: deque[list[Output]] = field(default_factory=deque)
    """Of each step, in their order. The thread puts them in, the caller takes them out."""

    @property
    def unfinished(self) -> set[RequestID]:
        """Requests whose last output was not taken yet."""
        # In this order: the thread gives the last output before it closes the request.
        unfinished = set(self.open.copy())
        for outputs in list(self.outputs):
            unfinished.update(output.request_id for output in outputs)
        return unfinished

    def take(self) -> list[Output]:
        """Hands over what one step brought, if something waits; called by the caller."""
        try:
            return self.outputs.popleft()
        except IndexError:
            return []

    def give(self, outputs: list[Output]) -> None:
        """Puts in what one step brought for requests that are still open; called by the thread."""
        outputs = [output for output in outputs if output.request_id in self.open]
        if outputs:
            self.outputs.append(outputs)
        for output in outputs:
            if output.is_last:
                del self.open[output.request_id]

    def drop(self, request_ids: Collection[RequestID]) -> None:
        """Forgets those of the requests that it has, and their outputs; called by the thread."""
        for request_id in request_ids:
            self.open.pop(request_id, None)
        for outputs in list(self.outputs):
            outputs[:] = [out for out in outputs if out.request_id not in request_ids]


@dataclass(eq=False)
class Answer:
    """One request on its way."""

    context: TextContext
    """What MAX's classes know of it."""
    row: Row
    """What the graph's inputs are made of."""
    stream: TextStream
    """Its text."""
    outbox: Outbox
    """Its caller's."""
    result: Result = field(default_factory=Result)
    """Complete when the answer is."""

    @property
    def request_id(self) -> RequestID:
        """Tells it apart from all others."""
        return self.context.request_id

    def take(self, brought: TextGenerationOutput, step: StepTimes) -> Output:
        """Adds what a step brought, at least one token, up to where the answer ends."""
        result, stream = self.result, self.stream
        taken: list[int] = []
        text = ""
        for token in brought.tokens:
            taken.append(token)
            text += stream.push(token)
            if stream.stopped:
                break
        logprobs = [self._read(found) for found in (brought.log_probabilities or [])[: len(taken)]]
        result.token_ids += taken
        result.logprobs += logprobs
        done = stream.stopped or self.context.is_done
        if done:
            text += stream.finish()
            result.text = stream.text
            result.drafted = self.row.acceptance.drafted
            result.accepted = self.row.acceptance.accepted
            ended = stream.stopped or self.context.status is GenerationStatus.END_OF_SEQUENCE
            result.finish_reason = "stop" if ended else "length"
        return Output(
            request_id=self.request_id,
            token_ids=taken,
            text=text,
            logprobs=logprobs,
            step=step,
            result=result if done else None,
        )

    def _read(self, found: LogProbabilities) -> TokenLogprobs:
        """What was asked for; the token itself may stand behind the most probable ones."""
        (logprob,), (top,) = found.token_log_probabilities, found.top_log_probabilities
        best = islice(top.items(), self.row.sampling.num_logprobs - 1)
        return TokenLogprobs(logprob=logprob, top=dict(best))

    def failed(self, error: BaseException) -> Output:
        """Says that nothing more will come, and why."""
        return Output(request_id=self.request_id, error=error)
