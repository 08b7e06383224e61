"""The results as a table for the terminal."""

from __future__ import annotations

from collections.abc import Mapping

from rich.box import SIMPLE_HEAD
from rich.table import Table

from .contenders import CONTENDERS
from .summary import Summary

__all__ = ["CAPTION", "TABLE_WIDTH", "results_table"]

TABLE_WIDTH = 96
"""Characters that the table needs."""

CAPTION = (
    "step: the median, from the end of one step to the end of the next. x MAX: over the step of "
    "MAX's own architecture with the same draft. tokens/s: of the whole batch. a step: tokens that "
    "a step brings to a row. floor: all weights and cached keys and values that a step reads, the "
    "draft's and the head once a pass, at the speed of a copy on this device; share: of the step."
)


def results_table(title: str, summaries: Mapping[int, Mapping[str, Summary]]) -> Table:
    """A part for each size of a batch, a row for each contender."""
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, pad_edge=False)
    table.add_column("", no_wrap=True)
    for heading in ("step ms", "x MAX", "tokens/s", "a step", "floor ms", "share"):
        table.add_column(heading, justify="right", no_wrap=True)
    for rows, by_name in summaries.items():
        table.add_section()
        table.add_row(f"[bold]batch {rows}[/bold]")
        for name, found in by_name.items():
            table.add_row(
                CONTENDERS[name].label,
                f"{1e3 * found.step_s:.2f}",
                "-" if found.to_max is None else f"{found.to_max:.2f}",
                f"{found.tokens_per_s:.0f}",
                f"{found.tokens_per_step:.2f}",
                f"{1e3 * found.floor_s:.2f}",
                f"{found.share:.0%}",
            )
    return table
