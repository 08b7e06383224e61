"""K by the number of requests."""

from __future__ import annotations

from typing import Any

import pytest

from unispec.batch_schedule import BatchSchedule
from unispec.errors import InputError


def test_each_batch_has_the_k_of_its_range() -> None:
    schedule = BatchSchedule.read([[1, 2, 5], [3, 6, 1], [7, 7, 0]])
    assert [schedule(rows) for rows in range(1, 10)] == [5, 5, 1, 1, 1, 1, 0, 0, 0]
    assert schedule.largest == 5


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        (3, "is 3; give a list"),
        ([1, 2], "give a list"),
        ([[1, 2]], r"\[1, 2\] is not three integers"),
        ([[1, 2, "3"]], "is not three integers"),
        ([[2, 3, 1]], r"\[2, 3, 1\] does not begin at 1"),
        ([[1, 3, 1], [5, 6, 1]], "does not begin at 4"),
        ([[1, 3, 1], [4, 3, 1]], "does not begin at 4, or ends before"),
        ([[1, 3, -1]], "has a K below 0"),
        ([[1, 3, 0]], r"^\[\[1, 3, 0\]\] has no K above 0; give num_spec"),
        ([], r"^\[\] has no K above 0"),
    ],
)
def test_what_is_no_schedule_is_refused(value: Any, reason: str) -> None:
    with pytest.raises(InputError, match=reason):
        BatchSchedule.read(value)
