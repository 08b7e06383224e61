"""A run that ends in time: measurements get fewer rounds where they take too long."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from time import monotonic

__all__ = ["Budget"]


class Budget:
    """Time that is divided among parts; what one leaves over, the later ones have.

    Args:
        seconds: for all parts.
        parts: how many there are.
    """

    def __init__(self, seconds: float, parts: int) -> None:
        self._seconds = seconds
        self._parts = parts

    @contextmanager
    def part(self) -> Iterator[float]:
        """Yields the time, as `monotonic` has it, at which the next part should end."""
        begin = monotonic()
        yield begin + max(self._seconds, 0) / self._parts
        self._seconds -= monotonic() - begin
        self._parts = max(self._parts - 1, 1)
