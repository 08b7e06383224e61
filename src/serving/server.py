"""Runs a server: its socket, the model's process, and what ends both."""

from __future__ import annotations

import asyncio
import logging
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING, Any, Final, TypeVar

import uvloop
from uvicorn import Config, Server

from .config import ServeConfig
from .gate import Gate
from .listening import url_of
from .state import State

if TYPE_CHECKING:
    from .loading import Loaded

__all__ = ["HttpServer", "Ready"]

logger = logging.getLogger(__name__)

T = TypeVar("T")

_LOG_INTERVAL_S: Final = 10
_DRAIN_S: Final = 30
"""How long running answers may go on after the server was told to stop."""
_LAST_WORDS_S: Final = 1
"""How long answers have to say that the model's process has ended."""


@dataclass(frozen=True)
class Ready:
    """A server that answers."""

    about: dict[str, Any]
    """What runs, as `/status` shows it."""
    url: str
    """Where it answers."""


class _Server(Server):
    """uvicorn's, without its signal handlers: they would end the process before the worker."""

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


@dataclass
class HttpServer:
    """The listening side and the model's process, until one of them ends."""

    load: Callable[[Callable[[str], None]], Loaded]
    """Reads the model; gets what is told of its phases."""
    config: ServeConfig
    """Whom it lets in."""
    about: dict[str, Any]
    """What is known of the model before it is read."""
    listening: socket.socket
    """Bound to where it listens."""
    metrics_port: int
    """Of MAX's own metrics."""
    on_progress: Callable[[str], None]
    """Gets the name of each phase of starting as it begins."""
    on_ready: Callable[[Ready], None]
    """Called once requests are answered."""

    def __post_init__(self) -> None:
        self._state = State(self.about)
        self._gate = Gate(self._state, api_key=self.config.api_key, page=self.config.page)
        self._server = _Server(
            Config(
                self._gate,
                log_config=None,
                log_level="warning",
                access_log=False,
                server_header=False,
                lifespan="off",
                ws="none",
                timeout_keep_alive=75,
                timeout_graceful_shutdown=_DRAIN_S,
                ssl_certfile=self.config.ssl_certfile,
                ssl_keyfile=self.config.ssl_keyfile,
            )
        )

    def run(self) -> int:
        """Serves until a signal ends it.

        Returns:
            The process's exit status: 0 after SIGTERM or Ctrl-C, 2 where the model cannot be used,
            1 where its process has ended by itself.

        Raises:
            InputError: a model or draft that cannot be used.
        """
        return uvloop.run(self._run())

    async def _run(self) -> int:
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, self._interrupt)
        listening = asyncio.create_task(self._server.serve(sockets=[self.listening]))
        worker = asyncio.create_task(self._run_worker())
        await asyncio.wait({listening, worker}, return_when=asyncio.FIRST_COMPLETED)
        self._stop()
        if worker.done():
            # Nothing more comes, so nobody is waited for that does not read what there is.
            await asyncio.wait({listening}, timeout=_LAST_WORDS_S)
            self._server.force_exit = True
        await listening
        worker.cancel()
        try:
            return await worker
        except asyncio.CancelledError:
            return 0

    def _interrupt(self) -> None:
        """What a signal does: running answers may finish, but for a second one."""
        if self._state.name == "stopping":
            self._server.force_exit = True
        else:
            logger.info(
                "Stopping: running answers have %d seconds; a second signal ends at once.", _DRAIN_S
            )
        self._stop()

    def _stop(self) -> None:
        self._state.stop()
        self._server.should_exit = True

    def _phase(self, name: str) -> None:
        self._state.phase = name
        self.on_progress(name)

    async def _run_worker(self) -> int:
        """Starts the model's process and keeps it; returns an exit status if that ends."""
        while not self._server.started:
            await asyncio.sleep(0.01)
        # In this thread: at its end MAX leaves what it has entered where it was imported. Who asks
        # in the meantime waits.
        import_module(f"{__package__}.loading")
        loaded = await _in_thread(lambda: self.load(self._phase))
        self._state.about = loaded.about
        self._phase(loaded.phase)
        # Not before MAX is there.
        from .interface import ModelInterface
        from .max_server import WorkerEnded, start_worker
        from .statistics import Statistics

        statistics = Statistics(loaded.frontend.model_name, self.config.max_queue_size)
        scheme = "http" if self.config.ssl_certfile is None else "https"
        url = url_of(scheme, self.config.host, self.listening.getsockname()[1])
        metrics_url = url_of("http", self.config.host, self.metrics_port) + "/metrics"
        try:
            async with start_worker(
                loaded.served.factory,
                loaded.served.pipeline_config,
                loaded.served.memory_plan,
                host=self.config.host,
                metrics_port=self.metrics_port,
            ) as worker:
                self._gate.interface = ModelInterface(
                    loaded.frontend, worker, self._state, statistics, metrics_url
                )
                self._state.begin()
                self.on_ready(Ready(loaded.about, url))
                while True:
                    await asyncio.sleep(_LOG_INTERVAL_S)
                    if (line := statistics.line()) is not None:
                        logger.info(line)
        except WorkerEnded as error:
            if error.told:
                return 2
            logger.error("The model's process has ended (%s); the server stops.", error)
            return 1


async def _in_thread(work: Callable[[], T]) -> T:
    """Does some work in a thread that the process does not wait for at its end."""
    done: Future[T] = Future()

    def run() -> None:
        done.set_running_or_notify_cancel()
        try:
            done.set_result(work())
        except BaseException as error:
            done.set_exception(error)

    threading.Thread(target=run, name="load", daemon=True).start()
    return await asyncio.wrap_future(done)
