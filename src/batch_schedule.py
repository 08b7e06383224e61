"""K by the number of requests in a step, as vLLM and MAX take it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from unispec.errors import InputError

__all__ = ["BatchSchedule"]


@dataclass(frozen=True)
class BatchSchedule:
    """Ranges of batch sizes with a K each; the last one holds for larger batches, too.

    Args:
        ranges: `(first, last, K)` each, from a batch of 1 on and without a gap.

    Raises:
        InputError: something else, or a K below 0.
    """

    ranges: tuple[tuple[int, int, int], ...]

    def __post_init__(self) -> None:
        expected = 1
        for each in self.ranges:
            if len(each) != 3 or any(type(number) is not int for number in each):
                raise self._refused(f"{list(each)!r} is not three integers")
            first, last, count = each
            if first != expected or last < first:
                raise self._refused(f"{list(each)} does not begin at {expected}, or ends before")
            if count < 0:
                raise self._refused(f"{list(each)} has a K below 0")
            expected = last + 1
        if not self.ranges or not self.largest:
            raise self._refused(f"{list(map(list, self.ranges))} has no K above 0")

    def __call__(self, rows: int) -> int:
        """K of a step with so many rows."""
        return next((k for first, last, k in self.ranges if first <= rows <= last), self._last)

    @property
    def largest(self) -> int:
        """The largest K."""
        return max(count for _, _, count in self.ranges)

    @property
    def _last(self) -> int:
        return self.ranges[-1][2]

    @classmethod
    def read(cls, value: Any) -> BatchSchedule:
        """A list of lists `[first, last, K]`, as JSON has it.

        Raises:
            InputError: it is something else.
        """
        if isinstance(value, BatchSchedule):
            return value
        if not isinstance(value, list | tuple) or not all(
            isinstance(each, list | tuple) for each in value
        ):
            raise InputError(
                f"num_speculative_tokens_per_batch_size is {value!r}; give a list such as"
                " [[1, 4, 3], [5, 32, 1]]: batches of 1 to 4 with K = 3, then K = 1"
            )
        return cls(tuple(tuple(each) for each in value))

    def _refused(self, reason: str) -> InputError:
        return InputError(
            f"{reason}; give num_speculative_tokens_per_batch_size ranges [first, last, K] that"
            " follow each other, such as [[1, 4, 3], [5, 32, 1]]"
        )
