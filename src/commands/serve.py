"""`unispec serve`: answers over HTTP."""

from __future__ import annotations

import socket
import sys
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from unispec.commands.files import check_checkpoints
from unispec.commands.libraries import quieten_libraries
from unispec.commands.model import (
    DEFAULT_MAX_BATCH_SIZE,
    ModelOptions,
    compiled_option,
    model_options,
)
from unispec.waiting import wait_asleep

if TYPE_CHECKING:
    from unispec.serving.config import ServeConfig
    from unispec.serving.loading import Loaded
    from unispec.serving.server import Ready

__all__ = ["serve"]

_PORT = click.IntRange(0, 65535)
_FILE = click.Path(exists=True, dir_okay=False, path_type=Path)


def _use_demo(context: click.Context, option: click.Parameter, wanted: bool) -> None:
    """Makes the demo model and its EAGLE-3 draft what options have that are not given."""
    if not wanted:
        return
    from unispec.checkpoints.demo import demo_draft_folder, demo_model_folder, ensure_demo_model

    context.default_map = {
        "model": str(ensure_demo_model(demo_model_folder())),
        "draft_model_path": str(demo_draft_folder("eagle3")),
        "speculative_method": "eagle3",
        "served_model_name": "smollm2-135m-instruct",
    }


@click.command()
@click.option(
    "--demo",
    is_flag=True,
    is_eager=True,
    expose_value=False,
    callback=_use_demo,
    help="Serve SmolLM2-135M-Instruct with its EAGLE-3 draft; other options may still change that.",
)
@model_options
@compiled_option
@click.option("--host", default="127.0.0.1", show_default=True, help="The address to listen at.")
@click.option(
    "--port", type=_PORT, default=8000, show_default=True, help="The port; 0: a free one."
)
@click.option(
    "--metrics-port",
    type=_PORT,
    default=8001,
    show_default=True,
    help="Port of MAX's own metrics, which /metrics has too; 0: a free one.",
)
@click.option(
    "--served-model-name",
    help="What clients call the model.  [default: its repository, or its folder's name]",
)
@click.option(
    "--max-queue-size",
    type=click.IntRange(min=1),
    help="Most answers that wait for their first token; more get status 429.  [default: no limit]",
)
@click.option(
    "--api-key",
    envvar="UNISPEC_API_KEY",
    help="What clients have to send as bearer token; rather set UNISPEC_API_KEY, which other users"
    " of the machine do not see.  [default: none is asked]",
)
@click.option("--ssl-certfile", type=_FILE, help="Certificate in PEM, for HTTPS.")
@click.option("--ssl-keyfile", type=_FILE, help="Its private key in PEM.")
@click.option(
    "--page/--no-page", default=True, help="Whether / is a page to try the model.  [default: page]"
)
def serve(
    model: ModelOptions,
    compiled: Path | None,
    host: str,
    port: int,
    metrics_port: int,
    served_model_name: str | None,
    max_queue_size: int | None,
    api_key: str | None,
    ssl_certfile: Path | None,
    ssl_keyfile: Path | None,
    page: bool,
) -> None:
    """Serve OpenAI's interface, several tokens a step where a draft is given.

    A draft changes the speed only: the answers are what the target alone would write.
    """
    quieten_libraries()
    check_checkpoints(
        model.model,
        weight_path=model.weight_path,
        draft=model.draft,
        method=model.speculative_method,
    )
    from unispec.serving.config import ServeConfig
    from unispec.serving.listening import bind, check_certificate

    config = ServeConfig(
        host=host,
        port=port,
        metrics_port=metrics_port,
        served_model_name=served_model_name,
        max_queue_size=max_queue_size,
        api_key=api_key,
        ssl_certfile=ssl_certfile,
        ssl_keyfile=ssl_keyfile,
        page=page,
    )
    check_certificate(config)
    with bind(host, port, "--port") as listening:
        with bind(host, metrics_port, "--metrics-port") as reserved:
            metrics_port = reserved.getsockname()[1]
        sys.exit(_serve(model, compiled, config, listening, metrics_port))


def _serve(
    model: ModelOptions,
    compiled: Path | None,
    config: ServeConfig,
    listening: socket.socket,
    metrics_port: int,
) -> int:
    import logging

    from rich.console import Console

    from unispec.commands.console import progress, served
    from unispec.serving.server import HttpServer

    logging.basicConfig(format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    logging.getLogger("unispec").setLevel(logging.INFO)
    terminal = Console(stderr=True)

    def load(on_progress: Callable[[str], None]) -> Loaded:
        from unispec.serving.loading import load

        engine = model.engine_config(DEFAULT_MAX_BATCH_SIZE, compiled)
        return load(engine, config, on_progress)

    with ExitStack() as waiting:
        phase = waiting.enter_context(progress(terminal))

        def ready(server: Ready) -> None:
            waiting.close()
            terminal.print(served(server, config))

        if model.devices == "cpu":
            wait_asleep()
        phase("starting MAX")
        return HttpServer(
            load=load,
            config=config,
            about=_about(model, config),
            listening=listening,
            metrics_port=metrics_port,
            on_progress=phase,
            on_ready=ready,
        ).run()


def _about(model: ModelOptions, config: ServeConfig) -> dict[str, Any]:
    """What `/status` shows until the model is read."""
    from unispec.serving.config import name_of

    return {
        "model": config.served_model_name or name_of(model.model),
        "target": name_of(model.model),
        "draft": None if model.draft is None else name_of(model.draft),
        "speculative_method": None if model.no_speculation else model.speculative_method,
        "num_speculative_tokens": None if model.no_speculation else model.num_speculative_tokens,
        "max_length": model.max_length,
        "max_batch_size": model.max_batch_size or DEFAULT_MAX_BATCH_SIZE,
    }
