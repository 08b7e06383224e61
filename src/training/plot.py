"""A picture of a fit: its loss and the held-out acceptance."""

from __future__ import annotations

from pathlib import Path

from .collection import write_atomically
from .fitting import History

__all__ = ["plot"]

_INK = "#22303c"
_SMOOTH = 0.9


def plot(history: History, path: Path) -> None:
    """Draws loss over steps, and acceptance per position over steps, as PNG.

    Raises:
        InputError: it cannot be written.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.6), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
    smooth: list[float] = []
    for loss in history.losses:
        smooth.append(loss if not smooth else _SMOOTH * smooth[-1] + (1 - _SMOOTH) * loss)
    left.plot(range(1, len(smooth) + 1), smooth, color=_INK, linewidth=1.2)
    left.set(title="Loss", xlabel="step")
    steps = [one.step for one in history.measures]
    width = len(history.measures[0].acceptance)
    for position in range(width):
        shares = [one.acceptance[position] for one in history.measures]
        shade = 1 - 0.75 * position / max(width - 1, 1)
        right.plot(steps, shares, marker="o", markersize=3, linewidth=1.4, color=_INK, alpha=shade)
        right.annotate(
            str(position + 1),
            (steps[-1], shares[-1]),
            xytext=(5, 0),
            textcoords="offset points",
            va="center",
            fontsize=8,
        )
    length = history.measures[-1].length
    right.set(title=f"Held-out acceptance per position: length {length:.2f}", xlabel="step")
    right.set_ylim(0, 1)
    for axes in (left, right):
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    write_atomically(path, lambda part: figure.savefig(part, format="png"))
