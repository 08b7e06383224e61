"""What is said of a contender at one size of a batch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median

from .contenders import CONTENDERS
from .floor import step_bytes
from .shapes import Shape
from .steps import Timed

__all__ = ["Summary", "summarise"]


@dataclass(frozen=True, kw_only=True)
class Summary:
    """Of all rounds together."""

    step_s: float
    """Median of all steps."""
    tokens_per_s: float
    """Of the whole batch."""
    tokens_per_step: float
    """Of one row."""
    bytes_per_step: int
    """That it reads at least."""
    floor_s: float
    """Those at the speed of a copy."""
    share: float
    """The floor over the step."""
    to_max: float | None
    """The step over that of MAX's own with the same draft; None where that did not take part."""


def summarise(
    measured: Mapping[str, Mapping[int, Sequence[Timed]]],
    shape: Shape,
    *,
    context: int,
    copy_bytes_per_s: float,
) -> dict[int, dict[str, Summary]]:
    """By rows of the batch, then by contender.

    Args:
        measured: by contender and rows, the steps of each round.
        context: tokens of a row that are in the cache, in the mean.
    """
    steps = {
        name: {
            rows: [second for timed in rounds for second in timed.seconds]
            for rows, rounds in by_rows.items()
        }
        for name, by_rows in measured.items()
    }
    found: dict[int, dict[str, Summary]] = {}
    for name, by_rows in measured.items():
        draft = CONTENDERS[name].draft
        rival = steps.get(f"max-{draft.method}", {})
        for rows, rounds in by_rows.items():
            seconds = steps[name][rows]
            tokens = sum(sum(timed.tokens) for timed in rounds)
            least = step_bytes(shape, draft, rows, context)
            step_s, floor_s = median(seconds), least / copy_bytes_per_s
            found.setdefault(rows, {})[name] = Summary(
                step_s=step_s,
                tokens_per_s=tokens / sum(seconds),
                tokens_per_step=tokens / len(seconds) / rows,
                bytes_per_step=least,
                floor_s=floor_s,
                share=floor_s / step_s,
                to_max=step_s / median(rival[rows]) if rows in rival else None,
            )
    return found
