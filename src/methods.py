"""The speculative methods that have an architecture here; imports nothing heavy."""

from __future__ import annotations

from typing import Any, Final, Literal, get_args

from unispec.errors import InputError

__all__ = [
    "DEFAULT_DRAFT_TOKENS",
    "DRAFT_METHODS",
    "LARGEST_DRAFT_TOKENS",
    "METHODS",
    "Method",
    "check_num_speculative_tokens",
]

Method = Literal["dflash", "eagle", "mtp"]
"""How a draft proposes tokens."""

METHODS: Final[tuple[Method, ...]] = get_args(Method)
"""Every `Method`."""

DRAFT_METHODS: Final[tuple[Method, ...]] = ("dflash", "eagle")
"""Those with a checkpoint for the draft; the other drafts are part of their target's."""

DEFAULT_DRAFT_TOKENS: Final[dict[Method, int | None]] = {"dflash": None, "eagle": 3, "mtp": 1}
"""K where none is count for; None: the checkpoint's block decides."""

LARGEST_DRAFT_TOKENS: Final[dict[Method, int]] = {"dflash": 31, "eagle": 8, "mtp": 8}
"""The largest K that a graph is built for."""


def check_num_speculative_tokens(
    method: Method | None, count: Any, *, loaded: int | None = None
) -> None:
    """Refuses a K that a graph cannot propose.

    Args:
        method: of the draft; None: there is none.
        count: K, as it is asked for.
        loaded: the largest K of a graph that is loaded already; None: the method's.

    Raises:
        InputError: it is no integer, out of range, or there is no draft.
    """
    if type(count) is not int:
        raise InputError(f"num_speculative_tokens is {count!r}; give an integer")
    if method is None:
        raise InputError(
            f"num_speculative_tokens is {count}, but there is no speculative method; give one,"
            " or leave it out"
        )
    largest = LARGEST_DRAFT_TOKENS[method] if loaded is None else loaded
    if not 1 <= count <= largest:
        reason = f" with {method}" if loaded is None else ", what the engine's graph is for"
        raise InputError(f"num_speculative_tokens is {count}; choose 1 to {largest}{reason}")
