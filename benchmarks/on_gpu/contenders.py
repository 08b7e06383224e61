"""Who is compared, and at which acceptance."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Literal

from .shapes import DraftShape

__all__ = ["CONTENDERS", "Contender", "mean_of_runs"]

EAGLE: Final = DraftShape("eagle", layers=1, draft_tokens=3, passes=3)
DFLASH: Final = DraftShape("dflash", layers=5, draft_tokens=7, passes=1)


@dataclass(frozen=True)
class Contender:
    """One engine with one draft."""

    name: str
    label: str
    system: Literal["unispec", "max"]
    draft: DraftShape


CONTENDERS: Final = {
    contender.name: contender
    for contender in (
        Contender("unispec-eagle", "unispec, EAGLE K=3", "unispec", EAGLE),
        Contender("max-eagle", "MAX's own, EAGLE K=3", "max", EAGLE),
        Contender("unispec-dflash", "unispec, DFlash K=7", "unispec", DFLASH),
        Contender("max-dflash", "MAX's own, DFlash K=7", "max", DFLASH),
    )
}
"""In the order in which they take their turns."""


def mean_of_runs(rate: float, draft_tokens: int) -> float:
    """What MAX calls the acceptance rate where each draft stands with this probability.

    It is the mean over i = 1 to K of the probability that the first i drafts stand.
    """
    return sum(rate**i for i in range(1, draft_tokens + 1)) / draft_tokens
