"""Character classes of patterns, without what the engine takes for quotes and backslashes."""

from __future__ import annotations

import re
from typing import Any, Final

__all__ = ["leave_out_nul"]

_FLAG_X: Final = re.compile(r"\(\?[a-zA-Z]*x[a-zA-Z-]*[:)]")
_FIRST_IN_CLASS: Final = re.compile(r"\^?\]?")
"""Where a closing bracket is a character."""


def leave_out_nul(node: dict[str, Any]) -> None:
    """Takes U+0000, which is never allowed, out of the character classes of patterns.

    The engine takes a class with all control characters, or all but the end of a line, for one
    that has quotes and backslashes.

    Raises:
        ValueError: a pattern has the flag x, which gives blanks and `#` another meaning.
    """
    if isinstance(node.get("pattern"), str):
        node["pattern"] = _without_nul(node["pattern"])
    named = node.get("patternProperties")
    if isinstance(named, dict):
        node["patternProperties"] = {_without_nul(key): value for key, value in named.items()}


def _without_nul(pattern: str) -> str:
    parts = []
    at = 0
    while at < len(pattern):
        end = at + 1
        if pattern[at] == "\\":
            end = at + 2
        elif pattern[at] == "[":
            end = _class_end(pattern, at)
            parts.append(rf"[{pattern[at:end]}--\x00]")
            at = end
            continue
        elif _FLAG_X.match(pattern, at):
            raise ValueError("its pattern has the flag x, which cannot be enforced")
        parts.append(pattern[at:end])
        at = end
    return "".join(parts)


def _class_end(pattern: str, at: int) -> int:
    """Where the bracket that opens at `at` has closed; classes may be in one another."""
    depth = 0
    while at < len(pattern):
        if pattern[at] == "\\":
            at += 1
        elif pattern[at] == "[":
            depth += 1
            at += len(_FIRST_IN_CLASS.findall(pattern, at + 1, at + 3)[0])
        elif pattern[at] == "]":
            depth -= 1
            if depth == 0:
                return at + 1
        at += 1
    return len(pattern)
