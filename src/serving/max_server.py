"""Adapter to MAX's server: its model worker, the way there, and its metrics.

`max.serve` has no documented interface; all that is used of it is here. Written against max 26.7.0;
`tests/test_max_contract.py` says what moved.
"""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from dataclasses import dataclass
from multiprocessing import get_context
from multiprocessing.synchronize import Event
from types import FrameType
from typing import Any, Final

from max.pipelines.context.exceptions import InputError as MaxInputError
from max.pipelines.lib import MemoryPlan, PipelineConfig
from max.pipelines.modeling.types import PipelineTask
from max.pipelines.request import RequestID
from max.serve.config import MetricRecordingMethod, Settings
from max.serve.pipelines.model_worker import start_model_worker
from max.serve.process_control import SubprocessExit
from max.serve.scheduler_result import SchedulerResult
from max.serve.telemetry.metrics import METRICS
from max.serve.telemetry.process_controller import start_process_consumer
from max.serve.worker_interface._zmq_queue import ZmqConfig, generate_zmq_ipc_path
from max.serve.worker_interface.zmq_interface import ZmqModelWorkerInterface

from unispec.errors import InputError
from unispec.pipelines.served.context import ServedContext
from unispec.pipelines.served.output import ServedOutput

from .children import MetricsCommit, end_with_parent

__all__ = ["METRICS", "ModelWorker", "Rejected", "WorkerEnded", "start_worker"]

INPUT_ERROR_STATUS: Final = 2
"""How a worker ends whose model cannot be used; it has said why."""

_ASK_AGAIN_S: Final = 0.1

_PYTHON: Final = "PYTHONEXECUTABLE"


class Rejected(Exception):
    """The worker did not begin with a request; says why."""


class WorkerEnded(Exception):
    """The worker's process has ended.

    Args:
        reason: how, as the operating system says it.
        told: whether it has said what was wrong with its input.
    """

    def __init__(self, reason: str, *, told: bool = False) -> None:
        super().__init__(reason)
        self.told = told


@dataclass(frozen=True)
class _Loader:
    """Builds the pipeline in the worker's process, which then lives as long as the server wants."""

    factory: Callable[[], Any]
    """Of MAX's registry."""
    ending: Event
    """Set when the server wants the worker to end."""
    server: int
    """The process that wants it."""

    def __call__(self) -> Any:
        self._outlast_signals()
        try:
            return self.factory()
        except InputError as error:
            print(f"error: {' '.join(str(error).split())}", file=sys.stderr, flush=True)
            os._exit(INPUT_ERROR_STATUS)

    def _outlast_signals(self) -> None:
        """Leaves signals that a terminal or a supervisor sends to all processes to the server.

        It lets running answers finish first, and ends this process after them.
        """

        def terminate(number: int, frame: FrameType | None) -> None:
            if self.ending.is_set():
                os._exit(0)

        signal.signal(signal.SIGINT, signal.SIG_IGN)
        signal.signal(signal.SIGTERM, terminate)
        end_with_parent(self.server)


class ModelWorker:
    """The process that runs the steps, as the server sees it."""

    def __init__(self, proxy: Any) -> None:
        self._proxy = proxy
        self._ended = False
        self._tasks: set[asyncio.Task[None]] = set()

    async def stream(self, context: ServedContext) -> AsyncGenerator[ServedOutput, None]:
        """Hands a request over; the outputs of its steps come from what is returned.

        Closing that before its end takes the request out.

        Raises:
            WorkerEnded: there is no worker any more.
        """
        if self._ended:
            raise WorkerEnded("it is gone")
        self._proxy.note_awaiting_admission(1)
        try:
            source = await self._proxy.stream(context.request_id, context)
        finally:
            self._proxy.note_awaiting_admission(-1)
        return self._outputs(context.request_id, source)

    async def _outputs(
        self, request_id: RequestID, source: AsyncGenerator[Any, None]
    ) -> AsyncGenerator[ServedOutput, None]:
        """Outputs one by one.

        Raises:
            Rejected: the worker did not begin, for example because a grammar cannot be compiled.
            WorkerEnded: the worker's process has ended.
        """
        found: asyncio.Queue[ServedOutput | Exception | None] = asyncio.Queue()
        reading = self._keep(self._read(source, found))
        try:
            while (item := await found.get()) is not None:
                if isinstance(item, Exception):
                    raise item
                yield item
        finally:
            if not reading.done():
                self._keep(self._withdraw(request_id, reading))

    async def _read(
        self,
        source: AsyncGenerator[Any, None],
        found: asyncio.Queue[ServedOutput | Exception | None],
    ) -> None:
        """Moves a request's outputs on, and behind them a None or what went wrong."""
        end: Exception | None = None
        try:
            async for outputs, _ in source:
                for output in outputs:
                    found.put_nowait(output)
            if self._ended:
                end = WorkerEnded("it is gone")
        except MaxInputError as error:
            # What a grammar's compiler says stands behind MAX's own words.
            said = str(error).rpartition("From llguidance: ")[2]
            end = Rejected(said)
        except Exception as error:
            end = error
        found.put_nowait(end)

    async def _withdraw(self, request_id: RequestID, reading: asyncio.Task[None]) -> None:
        """Asks until the worker has taken a request out.

        MAX's scheduler forgets a cancellation that overtakes its request.
        """
        while not (self._ended or reading.done()):
            self._proxy.cancel(request_id)
            await asyncio.wait({reading}, timeout=_ASK_AGAIN_S)

    def _keep(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        """A task that lives until it is done; the loop alone would not keep it."""
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    async def close(self) -> None:
        """Lets every request that waits for outputs know that none will come."""
        self._ended = True
        for queue in self._proxy.pending_out_queues.values():
            queue.put_nowait((time.monotonic(), SchedulerResult.cancelled()))
        await asyncio.gather(*self._tasks, return_exceptions=True)


@asynccontextmanager
async def start_worker(
    factory: Callable[[], Any],
    config: PipelineConfig,
    plan: MemoryPlan,
    *,
    host: str,
    metrics_port: int,
) -> AsyncIterator[ModelWorker]:
    """Starts the worker's process and the one that collects metrics; ends both afterwards.

    Entered when the model is loaded and its graph compiled.

    Args:
        factory: makes the pipeline, in the worker; can be pickled.
        host: where MAX's metrics are shown, at `metrics_port`.

    Raises:
        WorkerEnded: the worker's process has ended by itself, whenever that is.
    """
    settings = Settings(
        MAX_SERVE_HOST=host,
        MAX_SERVE_METRICS_ENDPOINT_PORT=metrics_port,
        MAX_SERVE_METRIC_RECORDING_METHOD=MetricRecordingMethod.PROCESS,
        MAX_SERVE_MW_TIMEOUT=None,
        # MAX shows what its own loggers say, and no others that are not named.
        MAX_SERVE_LOGS_ENABLE_COMPONENTS="unispec",
        MAX_SERVE_LOGS_CONSOLE_LEVEL=os.environ.get("MAX_SERVE_LOGS_CONSOLE_LEVEL", "WARNING"),
    )
    interface: Any = ZmqModelWorkerInterface(PipelineTask.TEXT_GENERATION, ServedContext)
    # MAX's own outputs do not say what became of the drafts.
    interface.response_queue_config = ZmqConfig(dict[RequestID, SchedulerResult[ServedOutput]])
    if _PYTHON not in os.environ:
        # Importing MAX names another Python in the native environment alone, and processes that
        # are spawned would not find the packages of a virtual environment.
        os.unsetenv(_PYTHON)
    ending = get_context("spawn").Event()
    try:
        async with start_process_consumer(settings, MetricsCommit()) as controller:
            metrics = controller.Client()
            METRICS.configure(client=metrics)
            async with start_model_worker(
                _Loader(factory, ending, os.getpid()),
                config,
                settings,
                metrics,
                model_worker_interface=interface,
                zmq_endpoint_base=generate_zmq_ipc_path(),
                memory_plan=plan,
            ) as proxy:
                worker = ModelWorker(proxy)
                try:
                    yield worker
                finally:
                    await worker.close()
                    ending.set()
    except BaseException as error:
        ended = _exit_behind(error)
        if ended is None:
            raise
        told = str(ended) == str(SubprocessExit(INPUT_ERROR_STATUS))
        raise WorkerEnded(str(ended), told=told) from None


def _exit_behind(error: BaseException | None) -> SubprocessExit | None:
    """The end of a process that is an error's cause; MAX groups what happens at the same time."""
    if error is None or isinstance(error, SubprocessExit):
        return error
    for one in (*getattr(error, "exceptions", ()), error.__cause__):
        if (found := _exit_behind(one)) is not None:
            return found
    return None
