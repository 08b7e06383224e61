"""Who is compared: the one table to extend."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

__all__ = ["CONTENDERS", "MAX", "MEMORY_WATCHED", "TARGET_ALONE", "Contender"]


@dataclass(frozen=True)
class Contender:
    """One way to generate the target's greedy output."""

    name: str
    label: str
    system: Literal["unispec", "max", "transformers"]
    draft_tokens: int = 0
    """Tokens proposed in a step; 0: one token a step."""


TARGET_ALONE = "target-alone"
MAX = "max"
MEMORY_WATCHED = ("fused-k3", TARGET_ALONE)

CONTENDERS = {
    contender.name: contender
    for contender in (
        Contender("fused-k1", "unispec, EAGLE K=1", "unispec", 1),
        Contender("fused-k3", "unispec, EAGLE K=3", "unispec", 3),
        Contender("fused-k5", "unispec, EAGLE K=5", "unispec", 5),
        Contender(TARGET_ALONE, "unispec, target alone", "unispec"),
        Contender(MAX, "MAX's own pipeline", "max"),
        Contender("transformers", "transformers, greedy", "transformers"),
        Contender("transformers-assisted", "transformers, prompt lookup", "transformers", 3),
    )
}
