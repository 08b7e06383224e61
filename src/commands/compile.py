"""`unispec compile`: the graph of a model is compiled once, for later starts or another machine."""

from __future__ import annotations

import sys
from contextlib import redirect_stdout
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

import click

from unispec.commands.files import check_checkpoints
from unispec.commands.libraries import quieten_libraries
from unispec.commands.model import ModelOptions, model_options
from unispec.new_folder import check_new_folder

__all__ = ["compile_graph"]


# Of GPUs that MAX knows.
_ARCHITECTURES: Final = ("sm_80", "sm_86", "sm_89", "sm_90a", "sm_100a", "sm_120a")


class Target(click.ParamType[str | None]):
    """`cpu`, or `cuda:ARCHITECTURE`, which becomes the architecture's name."""

    name = "target"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> str | None:
        """Returns a GPU's architecture, None for a CPU; fails of anything else."""
        if value == "cpu":
            return None
        api, _, rest = str(value).partition(":")
        architecture, _, count = rest.partition(":")
        if api != "cuda" or architecture not in _ARCHITECTURES:
            known = ", ".join(f"'cuda:{name}'" for name in _ARCHITECTURES)
            self.fail(f"'{value}' is neither 'cpu' nor one of {known}.", param, ctx)
        if count not in ("", "1"):
            self.fail(f"'{value}' has {count} GPUs; generate and serve run on one.", param, ctx)
        return architecture


@click.command("compile")
@model_options
@click.option(
    "--target",
    "architecture",
    type=Target(),
    default="cpu",
    show_default=True,
    help="What it is compiled for: cpu, which is this machine's, or cuda:ARCHITECTURE, a GPU that "
    "need not be here, such as cuda:sm_90a (H100, H200).",
)
@click.option(
    "-o",
    "--output",
    type=click.Path(path_type=Path),
    required=True,
    help="Folder for the compiled graph; new or empty.",
)
def compile_graph(model: ModelOptions, architecture: str | None, output: Path) -> None:
    """Compile a model's graph, for generate and serve with --compiled.

    Give the options of the later command. Those that the graph does not depend on, the number of
    prompts, of cache pages and of prompt tokens a step, may be others there.
    """
    quieten_libraries()
    check_new_folder(output)
    if model.devices != "cpu":
        raise click.UsageError(
            f"--devices {model.devices} is given, but --target says what is compiled for; leave"
            " --devices out"
        )
    check_checkpoints(
        model.model,
        weight_path=model.weight_path,
        draft=model.draft,
        method=model.speculative_method,
    )
    from rich.console import Console

    from unispec.commands.console import progress

    with redirect_stdout(sys.stderr), progress(Console(stderr=True)) as phase:
        phase("starting MAX")
        if architecture is not None:
            _pretend(architecture)
            model = replace(model, devices="gpu")
        from unispec.engine import Engine

        Engine(model.engine_config(num_prompts=1), on_progress=phase).compile(output)
    click.echo(f"Written to {output}")


def _pretend(architecture: str) -> None:
    """Lets MAX see one GPU of this architecture, whatever there is."""
    from max.driver import (
        set_virtual_device_api,
        set_virtual_device_count,
        set_virtual_device_target_arch,
    )

    set_virtual_device_api("cuda")
    set_virtual_device_target_arch(architecture)
    set_virtual_device_count(1)
