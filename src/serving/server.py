"""Runs a server: its socket, the model's process, and what ends both."""

from __future__ import annotations

import asyncio
import logging
import signal
import socket
import ssl
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Final

import uvloop
from uvicorn import Config, Server

from unispec.engine import Engine, EngineConfig
from unispec.engine.served_config import served_pipeline
from unispec.errors import InputError

from .app import App, make_app
from .config import ServeConfig
from .frontend import Frontend
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
    *,
    on_progress: Callable[[str], None],
    on_ready: Callable[[Ready], None],
) -> int:
    """Serves until a signal ends it.

    Args:
        on_progress: gets the name of each phase of starting as it begins.
        on_ready: called once requests are answered.

    Returns:
        The process's exit status: 0 after SIGTERM or Ctrl-C, 2 where the model cannot be used, 1
        where its process has ended by itself.

    Raises:
        InputError: a model or draft that cannot be used, a certificate that cannot be read, or a
            port that cannot be had.
    """
    _check_certificate(config)
    with _bind(config.host, config.port, "--port") as listening:
        with _bind(config.host, config.metrics_port, "--metrics-port") as reserved:
            metrics_port: int = reserved.getsockname()[1]
        engine = Engine(engine_config, on_progress=on_progress)
        frontend = Frontend(engine_config, config.served_model_name, engine)
        host = _Host(frontend, config, listening, metrics_port, on_progress, on_ready)
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
        self._statistics = Statistics(frontend.model_name)
        app = App(frontend, self._state, self._statistics, _url("http", config.host, metrics_port))
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
            max_queue_size=self._config.max_queue_size,
        ) as worker:
            self._state.begin(worker)
            scheme = "http" if self._config.ssl_certfile is None else "https"
            port = self._listening.getsockname()[1]
            self._on_ready(Ready(self._frontend, _url(scheme, self._config.host, port)))
            while True:
                await asyncio.sleep(_LOG_INTERVAL_S)
                if (line := self._statistics.line()) is not None:
                    logger.info(line)


def _url(scheme: str, host: str, port: int) -> str:
    named = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(host, f"[{host}]" if ":" in host else host)
    return f"{scheme}://{named}:{port}"


def _bind(host: str, port: int, option: str) -> socket.socket:
    """A socket at an address, bound before anything slow begins.

    Raises:
        InputError: the address cannot be had.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        bound = socket.socket(family, kind, protocol)
    except OSError as error:
        raise InputError(
            f"--host {host} is not known ({error.strerror}); give an address"
        ) from None
    bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        bound.bind(address)
    except OSError as error:
        bound.close()
        raise InputError(
            f"{option} {port} of {host} cannot be used ({error.strerror}); choose another"
        ) from None
    return bound


def _check_certificate(config: ServeConfig) -> None:
    if config.ssl_certfile is None or config.ssl_keyfile is None:
        return
    try:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(config.ssl_certfile, config.ssl_keyfile)
    except OSError as error:
        raise InputError(
            f"--ssl-certfile {config.ssl_certfile} and --ssl-keyfile {config.ssl_keyfile} cannot be"
            f" used ({error.strerror or error}); give a certificate and its key in PEM"
        ) from None
