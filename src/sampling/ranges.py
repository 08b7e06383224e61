"""What the numbers of a request may be; free of slow imports, so that it is told at once."""

from __future__ import annotations

from collections.abc import Mapping
from math import inf
from types import MappingProxyType
from typing import Final, NamedTuple

__all__ = ["LOGPROBS", "RANGES", "Range"]


class Range(NamedTuple):
    """Which numbers a sampling parameter may have."""

    low: float
    """The least."""
    high: float = inf
    """The most."""
    or_zero: str = ""
    """What zero, which is below the least, does; empty: it may not be zero."""
    is_integer: bool = False
    """Whether only integers are among them."""

    def holds(self, value: float) -> bool:
        """Whether a number is among them."""
        return self.low <= value <= self.high or bool(self.or_zero and value == 0)

    def __str__(self) -> str:
        """Says which numbers to choose."""
        zero = f"0, which {self.or_zero}, or " if self.or_zero else ""
        return f"{zero}{self.low:g} to {self.high:g}"


_LARGEST_PENALTY: Final = 1e6
"""Logits times it, or times its inverse, stay far below what float32 holds."""

RANGES: Final[Mapping[str, Range]] = MappingProxyType(
    {
        # Smaller ones may be zero to a processor: float32 loses digits below 1.2e-38.
        "temperature": Range(1e-37, 2, or_zero="takes the most probable token"),
        "top_k": Range(-1, 2**63 - 1, is_integer=True),
        "top_p": Range(0, 1),
        "min_p": Range(0, 1),
        "presence_penalty": Range(-2, 2),
        "frequency_penalty": Range(-2, 2),
        "repetition_penalty": Range(1 / _LARGEST_PENALTY, _LARGEST_PENALTY),
        "max_new_tokens": Range(1, is_integer=True),
        "min_new_tokens": Range(0, is_integer=True),
    }
)
"""By the names of MAX's `SamplingParams`, which are those of the command's options too."""

LOGPROBS: Final = Range(0, 20, is_integer=True)
"""How many of the most probable tokens a request may ask the log probabilities of."""
