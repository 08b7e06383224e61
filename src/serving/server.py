"""Runs a server: its socket, the model's process, and what ends both."""

from __future__ import annotations

import asyncio
import logging
import signal
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Final

import uvloop
from uvicorn import Config, Server

from unispec.engine import Engine, EngineConfig
from unispec.engine.served_config import served_pipeline

from .app import App, make_app
from .config import ServeConfig
from .frontend import Frontend
from .listening import url_of
from .max_server import WorkerEnded, start_worker
from .state import State
from .statistics import Statistics

__all__ = ["Ready", "serve"]

logger = logging.getLogger(__name__)

_LOG_INTERVAL_S: Final = 10
_DRAIN_S: Final = 30
"""How long running answers may go on after the server was told to stop."""


@dataclass(frozen=True)
class Ready:
    """A server that answers."""

    frontend: Frontend
    """What it knows of the model."""
    url: str
    """Where it answers."""


def serve(
    engine_config: EngineConfig,
    config: ServeConfig,
    listening: socket.socket,
    metrics_port: int,
    *,
    on_progress: Callable[[str], None],
    on_ready: Callable[[Ready], None],
) -> int:
    """Serves until a signal ends it.

    Args:
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
    engine = Engine(engine_config, on_progress=on_progress)
    frontend = Frontend(engine_config, config.served_model_name, engine)
    return uvloop.run(_Host(frontend, config, listening, metrics_port, on_progress, on_ready).run())


class _Server(Server):
    """uvicorn's, without its signal handlers: they would end the process before the worker."""

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


class _Host:
    """The listening side and the model's process, until one of them ends."""

    def __init__(
        self,
        frontend: Frontend,
        config: ServeConfig,
        listening: socket.socket,
        metrics_port: int,
        on_progress: Callable[[str], None],
        on_ready: Callable[[Ready], None],
    ) -> None:
        self._frontend = frontend
        self._config = config
        self._listening = listening
        self._metrics_port = metrics_port
        self._on_progress = on_progress
        self._on_ready = on_ready
        self._state = State()
        self._statistics = Statistics(frontend.model_name, config.max_queue_size)
        app = App(
            frontend, self._state, self._statistics, url_of("http", config.host, metrics_port)
        )
        self._server = _Server(
            Config(
                make_app(app, api_key=config.api_key, page=config.page),
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
            loop.add_signal_handler(number, self._stop)
        listening = asyncio.create_task(self._server.serve(sockets=[self._listening]))
        worker = asyncio.create_task(self._run_worker())
        await asyncio.wait({listening, worker}, return_when=asyncio.FIRST_COMPLETED)
        self._stop()
        await listening
        worker.cancel()
        try:
            await worker
        except WorkerEnded as error:
            if error.told:
                return 2
            logger.error("The model's process has ended (%s); the server stops.", error)
            return 1
        except asyncio.CancelledError:
            pass
        return 0

    def _stop(self) -> None:
        """Takes no further request; running answers may finish, but for a second call."""
        if self._state.name == "stopping":
            self._server.force_exit = True
        self._state.stop()
        self._server.should_exit = True

    async def _run_worker(self) -> None:
        found = served_pipeline(self._frontend.config)
        self._state.phase = "loading weights and compiling the graph"
        self._on_progress(f"{self._state.phase} (minutes when it is new, seconds afterwards)")
        async with start_worker(
            found.factory,
            found.pipeline_config,
            found.memory_plan,
            host=self._config.host,
            metrics_port=self._metrics_port,
        ) as worker:
            self._state.begin(worker)
            scheme = "http" if self._config.ssl_certfile is None else "https"
            port = self._listening.getsockname()[1]
            self._on_ready(Ready(self._frontend, url_of(scheme, self._config.host, port)))
            while True:
                await asyncio.sleep(_LOG_INTERVAL_S)
                if (line := self._statistics.line()) is not None:
                    logger.info(line)
