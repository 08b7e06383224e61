"""The results as a table for the terminal."""

from __future__ import annotations

from collections.abc import Mapping

from rich.box import SIMPLE_HEAD
from rich.table import Table

from .benchmark import Judgement
from .contenders import CONTENDERS
from .summary import Spread, Summary

__all__ = ["TABLE_WIDTH", "results_table"]

TABLE_WIDTH = 142
"""Characters that the table needs."""

_UNKNOWN = "-"
_CAPTION = (
    "Median of the answers, and under it their middle half; a ratio is taken prompt by prompt. "
    "tokens/s: decode steps only. step: from the arrival of one step's tokens to the next's; "
    "graph: share of it inside the compiled graph. accepted: mean acceptance length, 1 + accepted "
    "drafts a step. break-even: the acceptance length that equals the tokens/s of the target "
    "alone, and of MAX's own pipeline. exact: answers that are, token by token, what the target "
    "alone writes (+ those that differ only where two logits of the target tie). transformers' "
    "assisted generation takes its drafts from the text so far (prompt lookup), because there is "
    "no smaller model with this tokenizer to assist it."
)


def results_table(summaries: Mapping[str, Summary], judgements: Mapping[str, Judgement]) -> Table:
    """One row for each contender."""
    table = Table(
        box=SIMPLE_HEAD,
        caption=_CAPTION,
        caption_justify="left",
        border_style="dim",
        collapse_padding=True,
        pad_edge=False,
    )
    table.add_column("", no_wrap=True)
    for heading in (
        "tokens/s",
        "x MAX",
        "x target\nalone",
        "process\ns",
        "step\nms",
        "step, x\ntarget alone",
        "graph",
        "accepted",
        "break-even\ntarget, MAX",
        "exact",
    ):
        table.add_column(heading, justify="right", no_wrap=True)
    for name, summary in summaries.items():
        table.add_row(CONTENDERS[name].label, *_cells(summary, judgements[name]))
    return table


def _cells(summary: Summary, judgement: Judgement) -> list[str]:
    answers = judgement.exact + judgement.tied + judgement.wrong
    tied = f" (+{judgement.tied})" if judgement.tied else ""
    return [
        _spread(summary.tokens_per_second, 1),
        _spread(summary.speed_to_max, 2),
        _spread(summary.speed_to_target, 2),
        _spread(summary.process_s, 1),
        _spread(summary.step_time_s, 1, scale=1000),
        _spread(summary.step_time_to_target, 2),
        _UNKNOWN if summary.graph_share is None else f"{summary.graph_share.median:.1%}",
        f"{summary.mean_acceptance_length:.2f}",
        f"{_number(summary.break_even_to_target)}, {_number(summary.break_even_to_max)}",
        f"{judgement.exact}{tied} of {answers}",
    ]


def _spread(spread: Spread | None, digits: int, *, scale: float = 1) -> str:
    """The median, and under it the quartiles if they differ."""
    if spread is None:
        return _UNKNOWN
    middle, low, high = (
        f"{value * scale:.{digits}f}" for value in (spread.median, spread.low, spread.high)
    )
    return middle if low == high else f"{middle}\n[dim]{low}-{high}[/dim]"


def _number(value: float | None) -> str:
    return _UNKNOWN if value is None else f"{value:.2f}"
