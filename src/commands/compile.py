"""`unispec compile`: the graph of a model is compiled once, for later starts or another machine."""

from __future__ import annotations

import re
import sys
from contextlib import redirect_stdout
from dataclasses import replace
from pathlib import Path
from typing import Any

import click

from unispec.commands.files import check_checkpoints
from unispec.commands.libraries import quieten_libraries
from unispec.commands.model import ModelOptions, model_options
from unispec.new_folder import check_new_folder

__all__ = ["compile_graph"]


class Target(click.ParamType[str | None]):
    """`cpu`, or `cuda:ARCHITECTURE`, which becomes the architecture's name."""

    name = "target"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> str | None:
        """Returns a GPU's architecture, None for a CPU; fails of anything else."""
        if value == "cpu":
            return None
        found = re.fullmatch(r"cuda:(sm_\d+a?)", str(value))
        if found is None:
            self.fail(
                f"'{value}' is neither 'cpu' nor a GPU such as 'cuda:sm_90a' (H100, H200) or"
                " 'cuda:sm_100a' (B200).",
                param,
                ctx,
            )
        return found[1]


@click.command("compile")
@model_options
@click.option(
    "--target",
    "architecture",
    type=Target(),
    default="cpu",
    show_default=True,
    help="What it is compiled for: cpu, which is this machine's, or cuda:ARCHITECTURE, a GPU that "
    "need not be here.",
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

    The options have to be those of the later command; the number of prompts, tokens a step and
    pages may differ.
    """
    quieten_libraries()
    check_new_folder(output)
    if architecture is not None and model.devices != "cpu":
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
