"""Who is compared: the one table to extend."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from unispec.methods import Method

__all__ = ["CONTENDERS", "MAX", "MEMORY_WATCHED", "TARGET_ALONE", "Contender"]


@dataclass(frozen=True)
class Contender:
    """One way to generate the target's greedy output."""

    name: str
    label: str
    system: Literal["unispec", "max", "transformers"]
    draft_tokens: int = 0
    """Tokens proposed in a step; 0: one token a step."""
    method: Method | None = None
    """Of unispec's draft; None: the target alone."""
    waits_asleep: bool = False
    """Whether `wait_asleep` is called; for unispec it always is, as on its command line."""


TARGET_ALONE = "target-alone"
MAX = "max"
MEMORY_WATCHED = ("eagle3-k3", "dflash-k5", TARGET_ALONE)

CONTENDERS = {
    contender.name: contender
    for contender in (
        Contender("eagle3-k1", "unispec, EAGLE-3 K=1", "unispec", 1, "eagle3"),
        Contender("eagle3-k3", "unispec, EAGLE-3 K=3", "unispec", 3, "eagle3"),
        Contender("eagle3-k5", "unispec, EAGLE-3 K=5", "unispec", 5, "eagle3"),
        Contender("dflash-k5", "unispec, DFlash K=5", "unispec", 5, "dflash"),
        Contender(TARGET_ALONE, "unispec, target alone", "unispec"),
        Contender(MAX, "MAX's own pipeline", "max"),
        Contender("max-asleep", "MAX's own, waiting asleep", "max", waits_asleep=True),
        Contender("transformers", "transformers, greedy", "transformers"),
        Contender("transformers-assisted", "transformers, prompt lookup", "transformers", 3),
    )
}
