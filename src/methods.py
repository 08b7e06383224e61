"""The speculative methods that have an architecture here; imports nothing heavy."""

from __future__ import annotations

from typing import Final, Literal, get_args

__all__ = ["DEFAULT_DRAFT_TOKENS", "LARGEST_DRAFT_TOKENS", "METHODS", "Method"]

Method = Literal["dflash", "eagle"]
"""How a draft proposes tokens."""

METHODS: Final[tuple[Method, ...]] = get_args(Method)
"""Every `Method`."""

DEFAULT_DRAFT_TOKENS: Final[dict[Method, int | None]] = {"dflash": None, "eagle": 3}
"""K where none is asked for; None: the checkpoint's block decides."""

LARGEST_DRAFT_TOKENS: Final[dict[Method, int]] = {"dflash": 31, "eagle": 8}
"""The largest K that a graph is built for."""
