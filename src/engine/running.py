"""The one batch that all callers of an engine share."""

from __future__ import annotations

import atexit
import threading
import weakref
from collections.abc import Collection, Sequence
from functools import partial
from queue import SimpleQueue

from max.pipelines.request import RequestID

from unispec.pipelines.runtime.pipeline import SpeculativePipeline

from .answer import Answer, Outbox
from .requests import Output
from .scheduler import Scheduler
from .steps import Command, StepOptions, Steps

__all__ = ["RunningBatch"]


class RunningBatch:
    """Requests of any number of threads, in one sequence of steps.

    A thread of its own runs the steps, and nothing else touches the pipeline, the pages or the
    rows. Callers tell it what they want through one queue and wait at queues of their own, so
    there is no lock that an interrupt, which Python raises in a caller's thread, could leave
    locked, or open to two. The thread sleeps while no step is wanted.

    Args:
        pipeline: runs a step.
        scheduler: says which requests it has.
        options: may be changed at any time.
    """

    def __init__(
        self, pipeline: SpeculativePipeline, scheduler: Scheduler, options: StepOptions
    ) -> None:
        self.pipeline = pipeline
        self.scheduler = scheduler
        self._commands: SimpleQueue[Command] = SimpleQueue()
        # The thread knows the steps and not this object, so that it ends when this is gone.
        self._steps = Steps(pipeline, scheduler, options, self._commands)
        self._thread = threading.Thread(target=self._steps.run, name="unispec-steps", daemon=True)
        weakref.finalize(self, self._commands.put, self._steps.end).atexit = False
        atexit.register(_end, weakref.ref(self._thread), weakref.ref(self._steps), self._commands)
        self._thread.start()

    def add(self, outbox: Outbox, answers: Sequence[Answer]) -> None:
        """Lets requests that were not added before take part from the next step on, all at once."""
        # An interrupt between the two is made good by `abort`, or by the next `step`.
        outbox.open.update({answer.request_id: answer for answer in answers})
        self._commands.put(partial(self._steps.admit, outbox))

    def step(self, outbox: Outbox) -> list[Output]:
        """Takes what waits for the caller, or waits for a step and takes what it brought.

        The step is one that begins after this call, unless an earlier one brings something.

        Returns:
            Outputs of one step; none where it brought nothing, or no request is open.
        """
        taken = outbox.take()
        if not taken:
            done: SimpleQueue[None] = SimpleQueue()
            self._commands.put(partial(self._steps.request_step, outbox, done))
            done.get()
            taken = outbox.take()
        return taken

    def abort(self, outbox: Outbox, request_ids: Collection[RequestID]) -> None:
        """Takes requests out that are still there; returns when their pages and rows are free."""
        if request_ids:
            self._commands.put(partial(self._steps.remove, outbox, frozenset(request_ids)))
            self._wait()

    def reset_prefix_cache(self) -> None:
        """Forgets the pages that no request holds; returns when they are free."""
        self._commands.put(self.pipeline.kv_manager.reset_prefix_cache)
        self._wait()

    def _wait(self) -> None:
        """Returns when all that was asked before is done."""
        done: SimpleQueue[None] = SimpleQueue()
        self._commands.put(partial(done.put, None))
        done.get()


def _end(
    thread_reference: weakref.ref[threading.Thread],
    steps_reference: weakref.ref[Steps],
    commands: SimpleQueue[Command],
) -> None:
    """Ends a thread after the step that it is in, and waits for it.

    One that is inside the graph, or gives back its memory, while Python goes away would abort the
    process. It may outlive its batch by a moment, so the batch is not what is asked here.
    """
    thread, steps = thread_reference(), steps_reference()
    if steps is not None:
        commands.put(steps.end)
    if thread is not None and thread.is_alive():
        thread.join()
