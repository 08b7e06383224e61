"""Finished answers, in which others look for what comes next."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

__all__ = ["AnswerStore"]


class AnswerStore:
    """The last texts, found by the tokens at the end of another; the least recently used one goes.

    Args:
        capacity: tokens of all texts together.
        length: n, how many tokens have to agree.
    """

    def __init__(self, capacity: int, length: int) -> None:
        self._capacity = capacity
        self._length = length
        self._held = 0
        self._added = 0
        self._texts: OrderedDict[int, list[int]] = OrderedDict()
        # The last n tokens before a position, to the text's number and the position.
        self._places: dict[tuple[int, ...], tuple[int, int]] = {}

    def add(self, tokens: Sequence[int]) -> None:
        """Keeps a text; one that is longer than all that may be kept, its end."""
        text = list(tokens[-self._capacity :])
        if len(text) <= self._length:
            return
        known = self._places.get(tuple(text[: self._length]))
        if known is not None and self._texts[known[0]] == text:
            self._texts.move_to_end(known[0])
            return
        self._added += 1
        self._texts[self._added] = text
        self._held += len(text)
        for end in range(self._length, len(text)):
            self._places[tuple(text[end - self._length : end])] = (self._added, end)
        while self._held > self._capacity:
            self._forget()

    def continuation(self, tokens: Sequence[int], count: int) -> list[int]:
        """What followed the last n of these tokens when they were seen last, `count` at most.

        None where they were not seen.
        """
        place = self._places.get(tuple(tokens[-self._length :]))
        if place is None:
            return []
        number, end = place
        self._texts.move_to_end(number)
        return self._texts[number][end : end + count]

    def _forget(self) -> None:
        number, text = self._texts.popitem(last=False)
        self._held -= len(text)
        for end in range(self._length, len(text)):
            key = tuple(text[end - self._length : end])
            if self._places.get(key, (0, 0))[0] == number:
                del self._places[key]
