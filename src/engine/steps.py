"""What the thread of a batch does: steps, and what callers ask between them."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from queue import SimpleQueue
from typing import NamedTuple, TypeAlias

from max.pipelines.context import TextContext, TextGenerationOutput
from max.pipelines.modeling.types import TextGenerationInputs
from max.pipelines.request import RequestID

from unispec.errors import InputError
from unispec.pipelines.runtime.pipeline import SpeculativePipeline
from unispec.pipelines.runtime.speculating import DraftCount, pinned_by

from .answer import Answer, Outbox
from .requests import Output, Step, StepRow
from .scheduler import Scheduler

__all__ = ["Command", "StepOptions", "Steps"]

logger = logging.getLogger(__name__)

Command: TypeAlias = Callable[[], None]
"""What a caller wants done between two steps."""


@dataclass
class StepOptions:
    """What any thread may set, for the steps that begin from then on."""

    num_speculative_tokens: DraftCount
    """K; 0 without a speculative method."""
    on_step: Callable[[Step], None] | None = None
    """Called by the thread of the steps after each of them."""


class _Waiter(NamedTuple):
    """A caller that waits for a step."""

    outbox: Outbox
    step: int
    """The number of the first that begins after it asks."""
    done: SimpleQueue[None]


class Steps:
    """All that the thread knows; nothing here is called in another one.

    Args:
        options: are looked at in each step.
        commands: what callers ask: calls of `admit`, `request_step`, `remove` and `end`.
    """

    def __init__(
        self,
        pipeline: SpeculativePipeline,
        scheduler: Scheduler,
        options: StepOptions,
        commands: SimpleQueue[Command],
    ) -> None:
        self._pipeline = pipeline
        self._scheduler = scheduler
        self._options = options
        self._commands = commands
        self._answers: dict[RequestID, Answer] = {}
        self._waiters: list[_Waiter] = []
        self._steps_begun = 0
        self._ended = False

    def run(self) -> None:
        """Does what is asked and runs steps as long as one is wanted, until `end`."""
        while not self._ended:
            if self._is_step_wanted() and self._commands.empty():
                self._guarded(self._step)
            else:
                self._guarded(self._commands.get())
            self._reply()

    def end(self) -> None:
        """Runs no further step."""
        self._ended = True

    def admit(self, outbox: Outbox) -> None:
        """Lets the open requests of a caller take part, those that do not yet."""
        for answer in list(outbox.open.values()):
            if answer.request_id in self._answers:
                continue
            try:
                self._scheduler.add(answer.context)
            except InputError as error:
                outbox.give([answer.failed(error)])
            else:
                self._answers[answer.request_id] = answer
                self._pipeline.model.batch.rows[answer.request_id] = answer.row

    def request_step(self, outbox: Outbox, done: SimpleQueue[None]) -> None:
        """Wants a step that begins from now on.

        Args:
            done: gets an item when the step has ended, or there is something for the caller, or
                nothing can come.
        """
        self.admit(outbox)
        self._waiters.append(_Waiter(outbox, self._steps_begun + 1, done))

    def remove(self, outbox: Outbox, request_ids: frozenset[RequestID]) -> None:
        """Takes those of the caller's requests out that are still there."""
        outbox.drop(request_ids)
        for request_id in request_ids:
            self._free(request_id)

    def _is_step_wanted(self) -> bool:
        return bool(self._waiters) or any(a.outbox.goes_on for a in self._answers.values())

    def _guarded(self, work: Command) -> None:
        """Does some work; whatever fails in it fails all requests, and leaves nothing behind."""
        try:
            work()
        except BaseException as error:  # nobody may be left waiting, whatever it is
            for answer in list(self._answers.values()):
                try:
                    self._free(answer.request_id)
                except BaseException:
                    logger.exception("What a request holds could not be freed:")
                    del self._answers[answer.request_id]
                answer.outbox.give([answer.failed(error)])

    def _reply(self) -> None:
        """Lets callers go that need not wait any longer."""
        live = {answer.outbox for answer in self._answers.values()}
        still_waiting = []
        for waiter in self._waiters:
            if (
                waiter.step <= self._steps_begun
                or waiter.outbox.outputs
                or waiter.outbox not in live
            ):
                waiter.done.put(None)
            else:
                still_waiting.append(waiter)
        self._waiters = still_waiting

    def _step(self) -> None:
        self._steps_begun += 1
        outputs = self._execute()
        # Who left in the meantime gets nothing of it.
        while not self._commands.empty():
            self._guarded(self._commands.get())
        self._deliver(outputs)

    def _execute(self) -> list[Output]:
        """Runs a step; an error is an output of each row that it had."""
        batch: list[TextContext] = []
        outputs: dict[RequestID, Output] = {}
        try:
            batch = self._scheduler.next_batch()
            if not batch:
                raise RuntimeError("there are requests, but none of them can run")
            if self._pipeline.speculation is not None:
                count = self._options.num_speculative_tokens
                self._pipeline.speculation.pinned = pinned_by(count)
            results = self._pipeline.execute(TextGenerationInputs(batches=[batch]))
            times = self._pipeline.last_step
            assert times is not None
            if (hook := self._options.on_step) is not None:
                hook(Step(times=times, rows=self._rows(batch, results)))
            for context in batch:
                request_id = context.request_id
                if results[request_id].tokens:
                    outputs[request_id] = self._answers[request_id].take(results[request_id], times)
        except BaseException as error:  # a library's own may be no Exception
            failed = [context.request_id for context in batch] or list(self._answers)
            for request_id in failed:
                outputs.setdefault(request_id, self._answers[request_id].failed(error))
        return list(outputs.values())

    def _rows(
        self, batch: Sequence[TextContext], results: Mapping[RequestID, TextGenerationOutput]
    ) -> list[StepRow]:
        return [
            StepRow(
                context=context,
                row=self._answers[context.request_id].row,
                token_ids=results[context.request_id].tokens,
            )
            for context in batch
        ]

    def _deliver(self, outputs: Iterable[Output]) -> None:
        """Hands outputs over; what the answered requests held is free before."""
        by_outbox: dict[Outbox, list[Output]] = {}
        try:
            for output in outputs:
                answer = self._answers.get(output.request_id)
                if answer is None:
                    continue
                if output.is_last:
                    self._free(output.request_id)
                by_outbox.setdefault(answer.outbox, []).append(output)
        finally:
            for outbox, brought in by_outbox.items():
                outbox.give(brought)

    def _free(self, request_id: RequestID) -> None:
        answer = self._answers.get(request_id)
        if answer is not None:
            try:
                self._scheduler.finish(answer.context)
            finally:
                self._pipeline.release(request_id)
            del self._answers[request_id]
