"""The one batch that all callers of an engine share."""

from __future__ import annotations

import threading
from collections.abc import Collection, Sequence
from concurrent.futures import ThreadPoolExecutor

from max.pipelines.context import TextContext
from max.pipelines.modeling.types import TextGenerationInputs
from max.pipelines.request import RequestID

from unispec.errors import InputError

from .answer import Answer, Outbox
from .pipeline import SpeculativePipeline
from .requests import Output
from .scheduler import Scheduler

__all__ = ["RunningBatch"]


class RunningBatch:
    """Requests of any number of threads, in one sequence of steps.

    A thread of its own runs the steps, and nothing else touches the pipeline, the pages or the
    rows. So callers come and go at any time, and an interrupt, which Python raises in a caller's
    thread, never falls into a step. The thread sleeps while no step is wanted.

    Args:
        pipeline: see the attribute.
        scheduler: see the attribute.

    Attributes:
        pipeline: Runs a step.
        scheduler: Says which requests it has.
    """

    def __init__(self, pipeline: SpeculativePipeline, scheduler: Scheduler) -> None:
        self.pipeline = pipeline
        self.scheduler = scheduler
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="unispec-steps")
        # Only the thread changes these two.
        self._answers: dict[RequestID, Answer] = {}
        self._going_on = 0  # how many of them have a caller for whom steps go on
        # What follows is shared, and so are the outboxes. A plain lock is taken without a
        # moment at which an interrupt could leave it locked.
        self._lock = threading.Lock()
        self._changed = threading.Condition(self._lock)
        self._arrived: list[Answer] = []
        self._leaving: set[RequestID] = set()
        self._begun = 0  # steps
        self._ended = 0
        self._asked = 0  # the last step that a caller of `step` waits for
        self._awake = False

    def add(self, outbox: Outbox, answers: Sequence[Answer]) -> None:
        """Lets requests take part from the next step on, all of them at once.

        Args:
            outbox: the caller's.
            answers: of this outbox, not added before.
        """
        with self._lock:
            outbox.open |= {answer.request_id for answer in answers}
            self._arrived += answers

    def receive(self, outbox: Outbox) -> list[Output]:
        """Waits until there is something for a caller for whom steps go on.

        Args:
            outbox: the caller's; it has open requests.
        """
        with self._lock:
            while not outbox.outputs:
                self._wake()
                self._changed.wait()
            return outbox.take()

    def step(self, outbox: Outbox) -> list[Output]:
        """Runs one step and returns what is there for the caller then, which may be nothing.

        What came of steps that others wanted is returned at once.

        Args:
            outbox: the caller's.
        """
        with self._lock:
            if outbox.open and not outbox.outputs:
                wanted = self._begun + 1
                self._asked = max(self._asked, wanted)
                while self._ended < wanted and not outbox.outputs:
                    self._wake()
                    self._changed.wait()
            return outbox.take()

    def abort(self, outbox: Outbox, request_ids: Collection[RequestID]) -> None:
        """Takes requests out; returns when their pages and rows are free.

        Args:
            outbox: the caller's.
            request_ids: of its requests; those that it does not have, or has no more, do nothing.
        """
        with self._lock:
            gone = outbox.open & set(request_ids)
            self._leaving |= gone
            outbox.drop(gone)
            while gone & self._leaving:
                self._wake()
                self._changed.wait()

    def _wake(self) -> None:
        if not self._awake:
            # In this order, an interrupt between the two costs one idle wake.
            self._thread.submit(self._work)
            self._awake = True

    def _work(self) -> None:
        """Runs steps as long as one is wanted."""
        try:
            while self._begin():
                outputs = self._step()
                with self._lock:
                    self._ended = self._begun
                    for output in outputs:
                        self._deliver(output)
                    self._changed.notify_all()
        except BaseException as error:  # nobody may be left waiting, whatever it is
            with self._lock:
                lost = [*self._answers.values(), *self._arrived]
                self._answers, self._arrived, self._leaving = {}, [], set()
                self._going_on, self._awake = 0, False
                self._begun = self._ended = max(self._begun, self._asked)
                for answer in lost:
                    answer.outbox.outputs.append(answer.failed(error))
                self._changed.notify_all()

    def _begin(self) -> bool:
        """Lets requests come and go; returns whether a step is wanted, which then has begun."""
        with self._lock:
            for answer in self._arrived:
                self._admit(answer)
            self._arrived = []
            for request_id in self._leaving:
                self._end(request_id)
            self._leaving = set()
            wanted = bool(self._answers) and (self._going_on > 0 or self._begun < self._asked)
            if wanted:
                self._begun += 1
            else:
                self._awake = False
                # A step that was asked for and has no rows is over.
                self._begun = self._ended = max(self._begun, self._asked)
            self._changed.notify_all()
            return wanted

    def _step(self) -> list[Output]:
        """Runs a step; an error is an output of each row that it had."""
        batch: list[TextContext] = []
        outputs: dict[RequestID, Output] = {}
        try:
            batch = self.scheduler.next_batch()
            if not batch:
                raise RuntimeError("there are requests, but none of them can run")
            results = self.pipeline.execute(TextGenerationInputs(batches=[batch]))
            step = self.pipeline.last_step
            assert step is not None
            for context in batch:
                request_id = context.request_id
                if tokens := results[request_id].tokens:
                    outputs[request_id] = self._answers[request_id].take(tokens, step)
        except BaseException as error:  # a library's own may be no Exception
            failed = [context.request_id for context in batch] or list(self._answers)
            for request_id in failed:
                outputs.setdefault(request_id, self._answers[request_id].failed(error))
        return list(outputs.values())

    def _deliver(self, output: Output) -> None:
        outbox = self._answers[output.request_id].outbox
        if output.request_id not in self._leaving:
            outbox.outputs.append(output)
        if output.is_last:
            self._end(output.request_id)

    def _admit(self, answer: Answer) -> None:
        try:
            self.scheduler.add(answer.context)
        except InputError as error:
            answer.outbox.outputs.append(answer.failed(error))
            return
        self._answers[answer.request_id] = answer
        self.pipeline.model.batch.rows[answer.request_id] = answer.row
        self._going_on += answer.outbox.goes_on

    def _end(self, request_id: RequestID) -> None:
        answer = self._answers.pop(request_id, None)
        if answer is not None:
            self._going_on -= answer.outbox.goes_on
            self.scheduler.finish(answer.context)
            self.pipeline.release(request_id)
