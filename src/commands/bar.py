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
        A function that takes the share that is done, 0 to 1, and the fields.
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
    line, done, begin, printed = "", 0.0, time.monotonic(), float("-inf")

    def say() -> None:
        console.print(
            f"{time.monotonic() - begin:7.1f} s  {name}  {100 * done:3.0f} %  {line}",
            highlight=False,
            markup=False,
            soft_wrap=True,
        )

    with progress:
        task = progress.add_task(name, total=1.0, line="")

        def update(share: float, **fields: Any) -> None:
            nonlocal line, done, printed
            line, done = shown.format(**fields), share
            progress.update(task, completed=done, line=line)
            if not console.is_terminal and time.monotonic() - printed > _EVERY_SECONDS:
                printed = time.monotonic()
                say()

        yield update
    if not console.is_terminal:
        say()
