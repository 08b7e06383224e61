"""The folder that a training writes to; needs no torch, so that it is refused at once."""

from __future__ import annotations

from pathlib import Path

from unispec.errors import InputError

__all__ = ["check_output"]


def check_output(output: Path, *, resume: bool) -> None:
    """Refuses a folder that holds something, unless a training in it is to go on.

    Raises:
        InputError: it is not empty.
    """
    if not resume and output.is_dir() and any(output.iterdir()):
        raise InputError(f"{output} is not empty; give resume=True (--resume), or another output")
