"""The longest sequence that a model and its user allow."""

from __future__ import annotations

from typing import Any, Final

from unispec.errors import InputError

__all__ = ["longest_sequence"]

_MAX_POSITIONS: Final = 2**24
"""How many positions float32 tells apart, in which rotary angles are computed."""


def longest_sequence(hf_config: Any, max_length: int | None, *, source: str) -> int:
    """Tokens of prompt and output: `max_length`, or as many as the model has positions.

    Args:
        hf_config: the target's, for `max_position_embeddings`.
        max_length: what the user allows; None: all.
        source: the target's file or folder, for errors.

    Raises:
        InputError: `max_length` is beyond the target's `max_position_embeddings`, or these are no
            integer or beyond what float32 tells apart.
    """
    limit: Any = getattr(hf_config.get_text_config(), "max_position_embeddings", None)
    if type(limit) is not int or limit < 1:
        raise InputError(
            f"max_position_embeddings {limit!r} of {source} is no positive integer; correct its"
            " config.json"
        )
    if max_length is not None and max_length > limit:
        raise InputError(
            f"max_length {max_length} is beyond the model's max_position_embeddings {limit};"
            f" choose at most {limit}"
        )
    longest = max_length or limit
    if longest > _MAX_POSITIONS:
        raise InputError(
            f"max_position_embeddings {limit} of {source} is beyond the {_MAX_POSITIONS} positions"
            f" that float32 tells apart; give a max_length of at most {_MAX_POSITIONS}"
        )
    return longest
