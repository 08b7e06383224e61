"""The results of one number format as tables for the terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import median

from generation.summary import Spread
from rich.box import SIMPLE_HEAD
from rich.table import Table

from .contenders import CONTENDERS
from .measurement import Cell
from .summary import Summary

__all__ = ["CAPTION", "TABLE_WIDTH", "decode_table", "prefill_table"]

TABLE_WIDTH = 112
"""Characters that the tables need."""

_UNKNOWN = "-"
CAPTION = (
    "Median of the rounds, and under it their middle half. tokens/s: of the whole batch, first "
    "tokens left out, while all its prompts are decoded. step: the mean of an answer. accepted: "
    "tokens that a step brings to a row. x llama.cpp: tokens/s over those of llama.cpp alone, "
    "round by round. GB/s: all bytes of the target's weights over the step, a draft's left out, "
    "and their share of what plain reading reaches here. same: answers that are token by token "
    "those of the same program without speculation, or for other programs those of llama.cpp. "
    "llama.cpp has no draft model of this size to run beside a model of 135M: its own speculation "
    "is n-grams of the text so far, and what it is given here is our DFlash draft."
)


def decode_table(
    title: str, cells: Mapping[Cell, Mapping[str, Summary]], reading_gb_per_s: float
) -> Table:
    """A part for each cell, a row for each contender."""
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, pad_edge=False)
    table.add_column("", no_wrap=True)
    for heading in ("step ms", "tokens/s", "accepted", "x llama.cpp", "GB/s", "share", "same"):
        table.add_column(heading, justify="right", no_wrap=True)
    for cell, summaries in cells.items():
        table.add_section()
        table.add_row(f"[bold]{cell}[/bold]")
        for name, summary in summaries.items():
            table.add_row(CONTENDERS[name].label, *_cells(summary, reading_gb_per_s))
    return table


def prefill_table(prefill_s: Mapping[int, Mapping[str, Sequence[float]]]) -> Table:
    """Time to the first token, and the tokens of the prompt over it."""
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    table.add_column("", no_wrap=True)
    for length in prefill_s:
        table.add_column(f"{length} tokens,\nfirst token ms", justify="right", no_wrap=True)
        table.add_column("tokens/s", justify="right", no_wrap=True)
    names = dict.fromkeys(name for times in prefill_s.values() for name in times)
    for name in names:
        row = []
        for length, by_name in prefill_s.items():
            times = by_name.get(name)
            if not times:
                row += [_UNKNOWN, _UNKNOWN]
                continue
            row += [_spread(Spread.of(times), 1, scale=1000), f"{length / median(times):.0f}"]
        table.add_row(CONTENDERS[name].label, *row)
    return table


def _cells(summary: Summary, reading_gb_per_s: float) -> list[str]:
    same = _UNKNOWN if summary.same is None else "{} of {}".format(*summary.same)
    return [
        _spread(summary.step_s, 1, scale=1000),
        _spread(summary.tokens_per_second, 1),
        f"{summary.acceptance_length:.2f}",
        _UNKNOWN if summary.ratio is None else _spread(summary.ratio, 2),
        f"{summary.gb_per_second:.1f}",
        f"{summary.gb_per_second / reading_gb_per_s:.0%}",
        same,
    ]


def _spread(spread: Spread, digits: int, *, scale: float = 1) -> str:
    """The median, and under it the quartiles if they differ."""
    middle, low, high = (
        f"{value * scale:.{digits}f}" for value in (spread.median, spread.low, spread.high)
    )
    return middle if low == high else f"{middle}\n[dim]{low}-{high}[/dim]"
