"""What followed the same tokens before, found by trying every place."""

from __future__ import annotations

from collections.abc import Sequence

__all__ = ["longest_match", "looked_up"]


def longest_match(tokens: Sequence[int], at_most: int) -> tuple[int, int]:
    """Length of the longest suffix that stands before, and where it ended last; zeros of none."""
    for length in range(min(at_most, len(tokens) - 1), 0, -1):
        for end in range(len(tokens) - 1, length - 1, -1):
            if tokens[end - length : end] == tokens[-length:]:
                return length, end
    return 0, 0


def looked_up(tokens: Sequence[int], count: int, at_least: int, at_most: int) -> list[int]:
    """``count`` tokens that followed; beyond the end what was found repeats itself."""
    length, end = longest_match(tokens, at_most)
    if length < at_least:
        return []
    text = list(tokens)
    while len(text) < end + count:
        text.append(text[len(text) - len(tokens) + end])
    return text[end : end + count]
