"""Text that is piped into a command, or typed until Ctrl-D."""

from __future__ import annotations

import io
import sys

import click

__all__ = ["STANDARD_INPUT", "is_piped", "read_standard_input"]

STANDARD_INPUT = "standard input"
"""What messages call it."""

_READ = f"{__name__}.read"


def is_piped() -> bool:
    """Whether standard input is no terminal, and no option has read it."""
    return not sys.stdin.isatty() and _READ not in click.get_current_context().meta


def read_standard_input() -> str:
    """Returns all of it, read as UTF-8 whatever the terminal's encoding is.

    Raises:
        OSError: it cannot be read.
        UnicodeDecodeError: it is not UTF-8.
        ValueError: another option of the command has read it; the message continues
            "standard input ...".
    """
    meta = click.get_current_context().meta
    if _READ in meta:
        raise ValueError("is the value of two options; give a file for one of them")
    meta[_READ] = True
    return io.TextIOWrapper(io.BytesIO(sys.stdin.buffer.read()), encoding="utf-8-sig").read()
