"""The longest match of a text's end with what stands before, kept as the text grows."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final, NamedTuple

__all__ = ["Match", "SuffixAutomaton"]

# How many shorter matches learn of an occurrence, or are looked at for one of the length that is
# asked for; deeper ones are in texts that repeat themselves.
_DEPTH: Final = 16


class Match(NamedTuple):
    """Where the end of a text stood before."""

    length: int
    """Tokens that agree; 0: the last one is new."""
    end: int
    """The position after the earlier occurrence."""


class SuffixAutomaton:
    """A text's substrings, kept while it grows at its end, in constant time a token (amortised).

    After A. Blumer et al., "The smallest automaton recognizing the subwords of a text" (1985). A
    state stands for substrings that end at the same positions. The suffix link of the state of the
    whole text is the longest suffix that stands before, too.

    Args:
        tokens: token ids, the text's beginning.

    Attributes:
        tokens: the text.
    """

    def __init__(self, tokens: Iterable[int] = ()) -> None:
        self.tokens: list[int] = []
        # One entry a state: its longest substring's length, its suffix link, an end, its edges.
        self._length = [0]
        self._link = [-1]
        self._end = [0]
        self._next: list[dict[int, int]] = [{}]
        self._last = 0
        self.extend(tokens)

    def extend(self, tokens: Iterable[int]) -> None:
        """Appends tokens to the text."""
        for token in tokens:
            self._append(token)

    def longest_match(self, at_most: int) -> Match:
        """The longest suffix of the text that stands before, too, where it stood last.

        In texts that repeat themselves many times it may be an earlier place than the last.

        Args:
            at_most: how many tokens of the suffix are compared.
        """
        state = self._link[self._last]
        if state <= 0:
            return Match(0, 0)
        for _ in range(_DEPTH):
            if self._length[self._link[state]] < at_most:
                break
            state = self._link[state]
        return Match(min(self._length[state], at_most), self._end[state])

    def continuation(self, end: int, count: int) -> list[int]:
        """The `count` tokens from position `end` on; beyond the text it repeats what is there."""
        found = self.tokens[end : end + count]
        period = len(found)
        while found and len(found) < count:
            found.append(found[-period])
        return found

    def _append(self, token: int) -> None:
        self._refresh()
        self.tokens.append(token)
        length, link, edges = self._length, self._link, self._next
        new = self._state(len(self.tokens), 0, len(self.tokens), {})
        state = self._last
        while state != -1 and token not in edges[state]:
            edges[state][token] = new
            state = link[state]
        if state != -1:
            after = edges[state][token]
            if length[after] != length[state] + 1:
                after = self._split(state, token, after)
            link[new] = after
        self._last = new

    def _split(self, state: int, token: int, after: int) -> int:
        """A state of its own for the substrings of `after` that `state` and the token make."""
        length, link, edges = self._length, self._link, self._next
        copy = self._state(length[state] + 1, link[after], self._end[after], edges[after].copy())
        link[after] = copy
        while state != -1 and edges[state].get(token) == after:
            edges[state][token] = copy
            state = link[state]
        return copy

    def _state(self, length: int, link: int, end: int, edges: dict[int, int]) -> int:
        self._length.append(length)
        self._link.append(link)
        self._end.append(end)
        self._next.append(edges)
        return len(self._length) - 1

    def _refresh(self) -> None:
        """Tells suffixes of the text that they stand at its end, too, before it grows."""
        state = self._link[self._last]
        for _ in range(_DEPTH):
            if state <= 0:
                break
            self._end[state] = len(self.tokens)
            state = self._link[state]
