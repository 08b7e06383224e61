"""The speculative methods that have an architecture here; imports nothing heavy."""

from __future__ import annotations

from typing import Final, Literal, get_args

__all__ = [
    "DEFAULT_DRAFT_TOKENS",
    "DRAFT_METHODS",
    "LARGEST_DRAFT_TOKENS",
    "METHODS",
    "Method",
]

Method = Literal["dflash", "eagle", "mtp"]
"""How a draft proposes tokens."""

METHODS: Final[tuple[Method, ...]] = get_args(Method)
"""Every `Method`."""

DRAFT_METHODS: Final[tuple[Method, ...]] = ("dflash", "eagle")
"""Those with a checkpoint for the draft; the other drafts are part of their target's."""

DEFAULT_DRAFT_TOKENS: Final[dict[Method, int | None]] = {"dflash": None, "eagle": 3, "mtp": 1}
"""K where none is asked for; None: the checkpoint's block decides."""

LARGEST_DRAFT_TOKENS: Final[dict[Method, int]] = {"dflash": 31, "eagle": 8, "mtp": 8}
"""The largest K that a graph is built for."""
