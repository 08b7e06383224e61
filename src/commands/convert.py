"""`unispec convert`: a pickled checkpoint becomes safetensors."""

from __future__ import annotations

from pathlib import Path

import click

from unispec.commands.libraries import check_installed, quieten_libraries

__all__ = ["convert"]


@click.command()
@click.argument("checkpoint")
@click.argument("output", type=click.Path(path_type=Path))
def convert(checkpoint: str, output: Path) -> None:
    """Write CHECKPOINT's pytorch_model.bin as safetensors to the new folder OUTPUT.

    CHECKPOINT is a folder or a Hugging Face repository id, of a draft or a target. Its other
    files are copied. Only tensors are taken from the pickle, nothing in it is run. Needs the
    `train` extra: torch.
    """
    check_installed("torch")
    quieten_libraries()
    from unispec.checkpoints.draft_kinds import draft_kind
    from unispec.checkpoints.json_object import read_json_object
    from unispec.checkpoints.pickled import convert as convert_checkpoint

    shapes = convert_checkpoint(checkpoint, output)
    config = read_json_object(
        output / "config.json", label=f"config.json of {checkpoint}", fix="download it again"
    )
    kind = draft_kind(config, shapes)
    click.echo(f"Written to {output}: {len(shapes)} tensors" + (f", {kind}" if kind else ""))
