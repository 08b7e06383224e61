"""The results as a picture: tokens per second, and time of a step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
from matplotlib.axes import Axes

from .contenders import CONTENDERS
from .summary import Spread, Summary

__all__ = ["plot_results"]

_COLOURS = {"unispec": "#2f6f9f", "max": "#d08a2e", "transformers": "#8c8c8c"}
_TARGET_ALONE_COLOUR = "#8db5d1"
_INK = "#222222"
_ROW_INCHES = 0.52


def plot_results(summaries: Mapping[str, Summary], *, subtitle: str, file: Path) -> None:
    """Draws bars with their spread over the answers.

    Args:
        summaries: by contender, from top to bottom.
        subtitle: what was measured, on one line.
        file: the PNG to write.
    """
    figure, (speed, step) = plt.subplots(
        1, 2, figsize=(12, 1.8 + _ROW_INCHES * len(summaries)), sharey=True
    )
    colours = [_colour(name) for name in summaries]
    _bars(
        speed,
        [summary.tokens_per_second for summary in summaries.values()],
        colours,
        title="Decode speed, tokens/s",
        notes=[_compared(summary) for summary in summaries.values()],
    )
    steps = [summary.step_time_s for summary in summaries.values()]
    _bars(
        step, steps, colours, title="Time of a decode step, ms", notes=[""] * len(steps), scale=1000
    )
    _host_part(step, list(summaries.values()))
    speed.set_yticks(range(len(summaries)), [CONTENDERS[name].label for name in summaries])
    speed.invert_yaxis()
    figure.suptitle(
        "One stream of greedy decoding: SmolLM2-135M-Instruct, float32, CPU",
        x=0.01,
        ha="left",
        fontsize=14,
        fontweight="bold",
        color=_INK,
    )
    figure.text(0.01, 0.01, subtitle, ha="left", va="bottom", fontsize=8.5, color="#555555")
    figure.tight_layout(rect=(0, 0.04, 1, 0.98))
    figure.savefig(file, dpi=150)
    plt.close(figure)


def _compared(summary: Summary) -> str:
    ratio = summary.speed_to_max
    return "" if ratio is None else f"  {ratio.median:.2f} x MAX"


def _bars(
    axes: Axes,
    values: Sequence[Spread],
    colours: Sequence[str],
    *,
    title: str,
    notes: Sequence[str],
    scale: float = 1,
) -> None:
    rows = range(len(values))
    middle = [value.median * scale for value in values]
    low = [(value.median - value.low) * scale for value in values]
    high = [(value.high - value.median) * scale for value in values]
    axes.barh(rows, middle, color=colours, height=0.66, zorder=2)
    axes.errorbar(
        middle, rows, xerr=[low, high], fmt="none", ecolor=_INK, elinewidth=1, capsize=3, zorder=4
    )
    room = max(value.high for value in values) * scale
    for row, (value, note) in enumerate(zip(values, notes, strict=True)):
        axes.text(
            value.high * scale + room * 0.015,
            row,
            f"{value.median * scale:.1f}{note}",
            va="center",
            fontsize=9.5,
            color=_INK,
        )
    axes.set_xlim(0, room * (1.3 if any(notes) else 1.12))
    axes.set_title(title, loc="left", fontsize=11, color=_INK)
    axes.grid(axis="x", color="#e4e4e4", zorder=0)
    axes.tick_params(axis="both", length=0, labelsize=9.5, colors=_INK)
    for side in ("top", "right", "left", "bottom"):
        axes.spines[side].set_visible(False)


def _host_part(axes: Axes, summaries: Sequence[Summary]) -> None:
    """Marks the part of a step that is spent outside the compiled graph, where it is known."""
    label: str | None = "outside the compiled graph"
    for row, summary in enumerate(summaries):
        if summary.graph_time_s is None:
            continue
        graph_ms = summary.graph_time_s.median * 1000
        axes.barh(
            row,
            summary.step_time_s.median * 1000 - graph_ms,
            left=graph_ms,
            height=0.66,
            color="#c8453b",
            zorder=3,
            label=label,
        )
        label = None
    if label is None:
        axes.legend(loc="lower right", bbox_to_anchor=(1, 0.99), fontsize=9, frameon=False)


def _colour(name: str) -> str:
    contender = CONTENDERS[name]
    if contender.system == "unispec" and contender.draft_tokens == 0:
        return _TARGET_ALONE_COLOUR
    return _COLOURS[contender.system]
