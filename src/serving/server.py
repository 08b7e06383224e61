"""Runs a server: its socket, the model's process, and what ends both."""

from __future__ import annotations

import asyncio
import logging
import signal
import socket
import threading
from collections.abc import Callable, Iterator
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

__all__ = ["Ready", "serve"]

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


def serve(
    load: Callable[[Callable[[str], None]], Loaded],
    config: ServeConfig,
    about: dict[str, Any],
    listening: socket.socket,
    metrics_port: int,
    *,
    on_progress: Callable[[str], None],
    on_ready: Callable[[Ready], None],
) -> int:
    """Serves until a signal ends it.

    Args:
        load: imports MAX and reads the model; gets what is told of its phases.
        about: what is known of the model before that.
        listening: bound to where the server listens.
        metrics_port: of MAX's own metrics.
        on_progress: gets the name of each phase of starting as it begins.
        on_ready: called once requests are answered.

    Returns:
        The process's exit status: 0 after SIGTERM or Ctrl-C, 2 where the model cannot be used, 1
        where its process has ended by itself.

    Raises:
        InputError: a model or draft that cannot be used.
    """
    host = _Host(load, config, about, listening, metrics_port, on_progress, on_ready)
    return uvloop.run(host.run())


class _Server(Server):
    """uvicorn's, without its signal handlers: they would end the process before the worker."""

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


class _Host:
    """The listening side and the model's process, until one of them ends."""

    def __init__(
        self,
        load: Callable[[Callable[[str], None]], Loaded],
        config: ServeConfig,
        about: dict[str, Any],
        listening: socket.socket,
        metrics_port: int,
        on_progress: Callable[[str], None],
        on_ready: Callable[[Ready], None],
    ) -> None:
        self._load = load
        self._config = config
        self._listening = listening
        self._metrics_port = metrics_port
        self._on_progress = on_progress
        self._on_ready = on_ready
        self._state = State(about)
        self._gate = Gate(self._state, api_key=config.api_key, page=config.page)
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
                ssl_certfile=config.ssl_certfile,
                ssl_keyfile=config.ssl_keyfile,
            )
        )

    async def run(self) -> int:
        """Runs both; returns the exit status."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, self._interrupt)
        listening = asyncio.create_task(self._server.serve(sockets=[self._listening]))
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
        self._on_progress(name)

    async def _run_worker(self) -> int:
        """Starts the model's process and keeps it; returns an exit status if that ends."""
        while not self._server.started:
            await asyncio.sleep(0.01)
        # In this thread: at its end MAX leaves what it has entered where it was imported. Who asks
        # in the meantime waits.
        import_module(f"{__package__}.loading")
        loaded = await _in_thread(lambda: self._load(self._phase))
        self._state.about = loaded.about
        self._phase("loading weights and compiling the graph, which takes minutes for a new model")
        # Not before MAX is there.
        from .interface import ModelInterface
        from .max_server import WorkerEnded, start_worker
        from .statistics import Statistics

        statistics = Statistics(loaded.frontend.model_name, self._config.max_queue_size)
        scheme = "http" if self._config.ssl_certfile is None else "https"
        url = url_of(scheme, self._config.host, self._listening.getsockname()[1])
        metrics_url = url_of("http", self._config.host, self._metrics_port) + "/metrics"
        try:
            async with start_worker(
                loaded.served.factory,
                loaded.served.pipeline_config,
                loaded.served.memory_plan,
                host=self._config.host,
                metrics_port=self._metrics_port,
            ) as worker:
                self._gate.interface = ModelInterface(
                    loaded.frontend, worker, self._state, statistics, metrics_url
                )
                self._state.begin()
                self._on_ready(Ready(loaded.about, url))
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
    loop = asyncio.get_running_loop()
    done: asyncio.Future[T] = loop.create_future()

    def settle(value: T | None, error: BaseException | None) -> None:
        if done.cancelled():
            return
        if error is not None:
            done.set_exception(error)
        else:
            done.set_result(value)  # type: ignore[arg-type]

    def run() -> None:
        try:
            value = work()
        except BaseException as error:
            loop.call_soon_threadsafe(settle, None, error)
        else:
            loop.call_soon_threadsafe(settle, value, None)

    threading.Thread(target=run, name="load", daemon=True).start()
    return await done
