"""Progress bars for the stages of a long command, whose share that is done is known."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Final

from rich.console import Console
from rich.progress import (
    BarColumn,
    Progress,
    TaskID,
    TaskProgressColumn,
    TextColumn,
    TimeElapsedColumn,
)

__all__ = ["bars"]

_SECONDS_BETWEEN_LINES: Final = 10.0


@contextmanager
def bars(console: Console) -> Iterator[Callable[[str, float, str], None]]:
    """Shows how far each stage is, until the block is left.

    On a terminal a bar for each stage, which stays; else a line every ten seconds, and the last
    one of each stage.

    Yields:
        A function that takes the name of the stage, the share of it that is done, 0 to 1, and
        what stands behind the bar. Another name begins the next stage.
    """
    stages = _Bars(console) if console.is_terminal else _Lines(console)
    with stages:
        yield stages.update


class _Bars:
    def __init__(self, console: Console) -> None:
        self._progress = Progress(
            TextColumn("{task.description:<10}", markup=False),
            BarColumn(bar_width=8),
            TaskProgressColumn(),
            TimeElapsedColumn(),
            TextColumn("{task.fields[line]}", markup=False),
            console=console,
        )
        self._stage = ""
        self._task = TaskID(0)

    def __enter__(self) -> None:
        self._progress.start()

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def update(self, stage: str, share: float, line: str) -> None:
        if stage != self._stage:
            if self._stage:
                self._progress.stop_task(self._task)
            self._stage = stage
            self._task = self._progress.add_task(stage, total=1.0, line=line)
        self._progress.update(self._task, completed=share, line=line)


class _Lines:
    def __init__(self, console: Console) -> None:
        self._console = console
        self._stage = self._last = ""
        self._start = self._printed = 0.0

    def __enter__(self) -> None:
        pass

    def __exit__(self, *_: object) -> None:
        self._print_last()

    def update(self, stage: str, share: float, line: str) -> None:
        now = time.monotonic()
        if stage != self._stage:
            self._print_last()
            self._stage, self._start, self._printed = stage, now, float("-inf")
        self._last = f"{now - self._start:7.1f} s  {stage}  {100 * share:3.0f} %  {line}"
        if now - self._printed > _SECONDS_BETWEEN_LINES:
            self._printed = now
            self._print_last()

    def _print_last(self) -> None:
        """Prints what was shown last, unless it stands there already."""
        if self._last:
            self._console.print(self._last, highlight=False, markup=False, soft_wrap=True)
            self._last = ""
