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
        self._texts: OrderedDict[int, tuple[int, ...]] = OrderedDict()
        self._numbers: dict[tuple[int, ...], int] = {}
        # The last n tokens before a position, to the texts' numbers and the last position in each.
        self._places: dict[tuple[int, ...], dict[int, int]] = {}

    def add(self, tokens: Sequence[int]) -> None:
        """Keeps a text; one that is longer than all that may be kept, its end."""
        text = tuple(tokens[-self._capacity :])
        if len(text) <= self._length:
            return
        if text in self._numbers:
            self._texts.move_to_end(self._numbers[text])
            return
        self._added += 1
        self._texts[self._added] = text
        self._numbers[text] = self._added
        self._held += len(text)
        for end in range(self._length, len(text)):
            key = text[end - self._length : end]
            self._places.setdefault(key, {})[self._added] = end
        while self._held > self._capacity:
            self._forget()

    def continuation(self, tokens: Sequence[int], count: int) -> list[int]:
        """What followed the last n of these tokens in the last text that has them.

        Args:
            count: tokens at most; there are none where no text has them.
        """
        found = self._places.get(tuple(tokens[-self._length :]))
        if found is None:
            return []
        number, end = next(reversed(found.items()))
        self._texts.move_to_end(number)
        return list(self._texts[number][end : end + count])

    def _forget(self) -> None:
        number, text = self._texts.popitem(last=False)
        self._held -= len(text)
        del self._numbers[text]
        for key in {text[end - self._length : end] for end in range(self._length, len(text))}:
            del self._places[key][number]
            if not self._places[key]:
                del self._places[key]
