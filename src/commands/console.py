"""What the user sees: progress and numbers on stderr, answers on stdout."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, TextIO

from rich.box import ROUNDED
from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from unispec.methods import DRAFTLESS

if TYPE_CHECKING:
    from unispec.engine import Report
    from unispec.serving.config import ServeConfig
    from unispec.serving.server import Ready

__all__ = ["Answers", "progress", "served", "summary"]

UNMEASURED = "-"


@contextmanager
def progress(console: Console) -> Iterator[Callable[[str], None]]:
    """Shows what is going on until the block is left.

    On a terminal, a spinner with the phase and its elapsed time, which leaves no trace; else a
    line for each phase, with the seconds since the start.

    Yields:
        A function that takes the name of the phase that begins.
    """
    if not console.is_terminal:
        start = time.monotonic()
        yield lambda phase: console.print(
            f"{time.monotonic() - start:6.1f} s  {phase}",
            highlight=False,
            markup=False,
            soft_wrap=True,
        )
        return
    spinner = Progress(
        SpinnerColumn("line" if console.options.ascii_only else "dots"),
        TextColumn("{task.description}", markup=False),
        TimeElapsedColumn(),
        console=console,
        transient=True,
    )
    with spinner:
        task = spinner.add_task("starting", total=None)
        yield lambda phase: spinner.reset(task, total=None, description=phase)


class Answers:
    """Writes answers in prompt order, the first unfinished one as it comes.

    One answer is the whole output; of several, each stands under its prompt.
    """

    def __init__(self, prompts: Sequence[str], stream: TextIO) -> None:
        """Prepares to write the answers to `prompts`, one or more, to `stream`."""
        self._prompts = prompts
        self._stream = stream
        self._waiting = [""] * len(prompts)
        self._finished: set[int] = set()
        self._current = 0
        self._begun = False
        self._line_open = False

    def add(self, index: int, text: str) -> None:
        """Takes the next piece of an answer."""
        self._waiting[index] += text
        self._advance()

    def finish(self, index: int) -> None:
        """Marks an answer as complete."""
        self._finished.add(index)
        self._advance()

    def _advance(self) -> None:
        """Writes all that may be written by now."""
        while self._current < len(self._prompts):
            text, self._waiting[self._current] = self._waiting[self._current], ""
            finished = self._current in self._finished
            if text or finished:
                self._begin()
            self._write(text)
            if not finished:
                return
            self._write("\n" if self._line_open else "")
            self._current += 1
            self._begun = False

    def _begin(self) -> None:
        """Writes the current answer's heading, once."""
        if self._begun:
            return
        self._begun = True
        if len(self._prompts) == 1:
            return
        if self._current > 0:
            self._write("\n")
        heading = f"[{self._current + 1}/{len(self._prompts)}] {self._prompts[self._current]}"
        Console(file=self._stream).print(
            Text(heading, style="bold"), no_wrap=True, overflow="ellipsis"
        )

    def _write(self, text: str) -> None:
        if text:
            self._stream.write(text)
            self._stream.flush()
            self._line_open = not text.endswith("\n")


def summary(report: Report) -> Table:
    """Returns a report's numbers as a table of two columns."""
    table = Table(box=ROUNDED, show_header=False, border_style="dim")
    table.add_column()
    table.add_column(justify="right")
    if len(report.results) > 1:
        table.add_row("prompts", str(len(report.results)))
    table.add_row("tokens", str(sum(len(result.token_ids) for result in report.results)))
    table.add_row("tokens/s", _number(report.tokens_per_second, "{:.1f}"))
    table.add_row("time to first token", _number(report.time_to_first_token_s, "{:.2f} s"))
    table.add_row("step time", _number(report.step_time_s * 1000, "{:.1f} ms"))
    table.add_row("mean acceptance length", _number(report.mean_acceptance_length, "{:.2f}"))
    shares = [_number(share, "{:.0%}") for share in report.acceptance_per_position]
    table.add_row("acceptance per position", " ".join(shares) or UNMEASURED)
    speculation = report.speculation
    if speculation is not None:
        proposers = [
            f"{source}: {found.accepted} of {found.drafted}"
            for source, found in speculation.sources.items()
            if found.drafted
        ]
        table.add_row("accepted", "\n".join(proposers) or UNMEASURED)
        verified = speculation.steps_by_verified
        steps = [f"{steps} x {number}" for number, steps in sorted(verified.items())]
        table.add_row("steps x drafts verified", "\n".join(steps) or UNMEASURED)
    return table


def served(server: Ready, config: ServeConfig) -> Table:
    """Returns what a server answers and where, as a table of two columns."""
    about, url = server.about, server.url
    table = Table(box=ROUNDED, show_header=False, border_style="dim")
    table.add_column()
    table.add_column(overflow="fold")
    table.add_row("model", Text(about["model"]))
    method = about["speculative_method"]
    if method is None:
        table.add_row("draft", "none")
    else:
        draft = about["draft"] or ("n-grams" if method in DRAFTLESS else "the target's own")
        table.add_row("draft", Text(f"{draft} ({method}, K = {about['num_speculative_tokens']})"))
    table.add_row("longest sequence", f"{about['max_length']} tokens")
    table.add_row("rows at a time", str(about["max_batch_size"]))
    if config.host in ("0.0.0.0", "::"):
        table.add_row("listens at", f"{config.host}, for other machines too")
    table.add_row("interface", f"{url}/v1")
    table.add_row("metrics", f"{url}/metrics")
    if config.page:
        table.add_row("try it", f"{url}/")
    return table


def _number(value: float, pattern: str) -> str:
    return pattern.format(value) if math.isfinite(value) else UNMEASURED
