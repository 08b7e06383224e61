"""The table as a picture: speed relative to the target alone, cell by cell."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt

__all__ = ["plot_cells"]

_COLOURS = {"auto": "#c0392b", "alone": "#8c8c8c"}
_OTHER = "#8db5d1"


def plot_cells(
    cells: Mapping[str, Mapping[str, float]], names: Sequence[str], *, subtitle: str, file: Path
) -> None:
    """Draws a line of dots for each cell.

    Args:
        cells: tokens a second by cell, and there by contender.
        names: contenders, the one that is compared last.
        subtitle: what was measured, on one line.
        file: the PNG to write.
    """
    figure, axes = plt.subplots(figsize=(10, 1.6 + 0.28 * len(cells)))
    for at, speeds in enumerate(cells.values()):
        for name in names:
            ratio = speeds[name] / speeds["alone"]
            is_auto = name == "auto"
            axes.scatter(
                ratio,
                at,
                s=60 if is_auto else 22,
                marker="D" if is_auto else "o",
                color=_COLOURS.get(name, _OTHER),
                zorder=3 if is_auto else 2,
                label=name if at == 0 and name in _COLOURS else None,
            )
    axes.scatter([], [], s=22, color=_OTHER, label="each other choice")
    axes.axvline(1.0, color="#8c8c8c", linewidth=0.8)
    axes.set_yticks(range(len(cells)), list(cells))
    axes.invert_yaxis()
    axes.set_xlabel("tokens a second, times the target alone")
    axes.legend(loc="lower right", frameon=False)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.grid(axis="x", linewidth=0.4)
    axes.set_title("What each step chooses against each fixed choice", loc="left")
    figure.text(0.01, 0.005, subtitle, ha="left", va="bottom", fontsize=8, color="#555555")
    figure.tight_layout(rect=(0, 0.02, 1, 1))
    figure.savefig(file, dpi=150)
    plt.close(figure)
