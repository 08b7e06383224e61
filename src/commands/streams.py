"""Standard streams that a command can use, whatever its caller made of them."""

from __future__ import annotations

import io
import os
import select
import sys
from collections.abc import Callable
from typing import Any, TextIO

import click

__all__ = ["BROKEN_PIPE_STATUS", "prepare_streams"]

BROKEN_PIPE_STATUS = 141
"""128 + SIGPIPE, as a shell reports a command whose reader has gone."""


def prepare_streams() -> None:
    """Replaces the standard streams of this process by ones that no output breaks.

    A stream that the caller closed is the null device. What an encoding lacks is replaced. The
    first write to stdout that fails ends the command, in silence where the reader of a pipe has
    gone, else with `click.ClickException`; what follows it is thrown away. Writes to stderr that
    fail are thrown away: there is nobody to tell, and the answer is still wanted.
    """
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:
            # The lowest one that is free, which is this one, also for processes to come.
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)
    # Python makes no streams of descriptors that were closed.
    sys.stdin = sys.stdin or os.fdopen(0, closefd=False)
    sys.stdout = _writer(1, sys.stdout, _end_command)
    sys.stderr = _writer(2, sys.stderr, lambda error: None)


def _writer(
    descriptor: int, before: TextIO | None, on_failure: Callable[[OSError], None]
) -> io.TextIOWrapper:
    errors = before.errors if before else None
    return io.TextIOWrapper(
        io.BufferedWriter(_Output(descriptor, on_failure)),
        encoding=before.encoding if before else "utf-8",
        errors="replace" if errors in (None, "strict", "surrogateescape") else errors,
        line_buffering=bool(before and before.line_buffering),
    )


class _Output(io.FileIO):
    """A descriptor to write to until a write fails; what comes then is thrown away."""

    def __init__(self, descriptor: int, on_failure: Callable[[OSError], None]) -> None:
        super().__init__(descriptor, "w", closefd=False)
        self._on_failure = on_failure
        self._failed = False

    def write(self, data: Any) -> int:
        if not self._failed:
            try:
                # None: another process made the pipe non-blocking, and it is full.
                while (written := super().write(data)) is None:
                    select.select([], [self], [])
                return written
            except OSError as error:
                self._failed = True
                self._on_failure(error)
        return len(data)


def _end_command(error: OSError) -> None:
    if isinstance(error, BrokenPipeError):
        sys.exit(BROKEN_PIPE_STATUS)
    raise click.ClickException(
        f"the output cannot be written ({error.strerror}); free space or send it elsewhere"
    )
