"""The results as a picture: tokens per second of each format and cell."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from textwrap import fill

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
from matplotlib.axes import Axes

from .contenders import CONTENDERS, System
from .measurement import Cell
from .summary import Summary

__all__ = ["plot_results"]

_COLOURS: dict[System, str] = {
    "unispec": "#2f6f9f",
    "llama.cpp": "#5a9367",
    "max": "#d08a2e",
    "transformers": "#8c8c8c",
    "openvino": "#8c6bb1",
}
_INK = "#222222"
_COLUMN_INCHES = 5.2
_ROW_INCHES = 0.34
_CHARACTERS_AN_INCH = 14


def plot_results(
    formats: Mapping[str, Mapping[Cell, Mapping[str, Summary]]],
    *,
    title: str,
    subtitle: str,
    file: Path,
) -> None:
    """Draws bars with their spread over the rounds.

    Args:
        formats: by label from top to bottom, the cells from left to right.
        title: the model, and what was done.
        subtitle: what was measured.
        file: the PNG to write.
    """
    columns = max(len(cells) for cells in formats.values())
    heights = [max(len(names) for names in cells.values()) + 2 for cells in formats.values()]
    figure, axes = plt.subplots(
        len(formats),
        columns,
        figsize=(1.5 + _COLUMN_INCHES * columns, 1.2 + _ROW_INCHES * sum(heights)),
        height_ratios=heights,
        squeeze=False,
    )
    for row, (label, cells) in zip(axes, formats.items(), strict=True):
        for ax, (cell, summaries) in zip(row, cells.items(), strict=False):
            _bars(ax, f"{label}, {cell}", summaries)
    figure.suptitle(title, x=0.01, ha="left", fontsize=14, fontweight="bold", color=_INK)
    # As many characters as fit.
    lines = fill(subtitle, round(_CHARACTERS_AN_INCH * figure.get_figwidth()))
    figure.text(0.01, 0.005, lines, ha="left", va="bottom", fontsize=8.5, color="#555555")
    figure.tight_layout(rect=(0, 0.05, 1, 0.98))
    figure.savefig(file, dpi=120)
    plt.close(figure)


def _bars(axes: Axes, title: str, summaries: Mapping[str, Summary]) -> None:
    speeds = [summary.tokens_per_second for summary in summaries.values()]
    places = range(len(speeds))
    middle = [speed.median for speed in speeds]
    around = [
        [speed.median - speed.low for speed in speeds],
        [speed.high - speed.median for speed in speeds],
    ]
    colours = [_COLOURS[CONTENDERS[name].system] for name in summaries]
    axes.barh(places, middle, color=colours, height=0.66, zorder=2)
    axes.errorbar(
        middle, places, xerr=around, fmt="none", ecolor=_INK, elinewidth=1, capsize=3, zorder=4
    )
    room = max(speed.high for speed in speeds)
    for place, (speed, summary) in enumerate(zip(speeds, summaries.values(), strict=True)):
        note = "" if summary.ratio is None else f"  {summary.ratio.median:.2f} x"
        axes.text(
            speed.high + room * 0.02,
            place,
            f"{speed.median:.0f}{note}",
            va="center",
            fontsize=8.5,
            color=_INK,
        )
    axes.set_xlim(0, room * 1.3)
    axes.set_yticks(places, [CONTENDERS[name].label for name in summaries])
    axes.invert_yaxis()
    axes.set_title(f"{title}: tokens/s", loc="left", fontsize=10, color=_INK)
    axes.grid(axis="x", color="#e4e4e4", zorder=0)
    axes.tick_params(axis="both", length=0, labelsize=8.5, colors=_INK)
    for side in ("top", "right", "left", "bottom"):
        axes.spines[side].set_visible(False)
