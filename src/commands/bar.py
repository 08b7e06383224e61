"""A progress bar for work whose share that is done is known."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn

__all__ = ["bar"]

_EVERY_SECONDS = 10.0


@contextmanager
def bar(console: Console, name: str, shown: str) -> Iterator[Callable[..., None]]:
    """Shows how far a stage is, until the block is left.

    On a terminal a bar that stays; else a line every ten seconds, and the last one.

    Args:
        console: where.
        name: of the stage.
        shown: behind the bar, a format of the task's fields.

    Yields:
        A function that takes the share that is done, None if it is unknown, and the fields.
    """
    progress = Progress(
        TextColumn("{task.description:<10}", markup=False),
        BarColumn(bar_width=8),
        TaskProgressColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.fields[line]}", markup=False),
        console=console,
        disable=not console.is_terminal,
    )
    line, begin, printed = "", time.monotonic(), float("-inf")

    def say(share: float | None) -> None:
        percent = "" if share is None else f"{100 * share:3.0f} %  "
        console.print(
            f"{time.monotonic() - begin:7.1f} s  {name}  {percent}{line}",
            highlight=False,
            markup=False,
            soft_wrap=True,
        )

    with progress:
        task = progress.add_task(name, total=None, line="")
        last: float | None = None

        def update(share: float | None, **fields: Any) -> None:
            nonlocal line, printed, last
            line, last = shown.format(**fields), share
            total = None if share is None else 1.0
            progress.update(task, completed=share or 0.0, total=total, line=line)
            if not console.is_terminal and time.monotonic() - printed > _EVERY_SECONDS:
                printed = time.monotonic()
                say(share)

        yield update
        if last is None:
            progress.update(task, completed=1.0, total=1.0)
    if not console.is_terminal:
        say(last)
