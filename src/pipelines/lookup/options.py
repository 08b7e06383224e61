"""What is looked up for a request, and where."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

__all__ = ["DEFAULT_LOOKUP_MAX", "DEFAULT_LOOKUP_MIN", "LookupOptions"]

DEFAULT_LOOKUP_MIN: Final = 2
"""Tokens that have to agree, if nothing is asked for."""

DEFAULT_LOOKUP_MAX: Final = 16
"""Tokens that are compared, if nothing is asked for."""


@dataclass(frozen=True)
class LookupOptions:
    """How proposals are looked up; names as in vLLM's `prompt_lookup_min` and `..._max`."""

    shortest: int = DEFAULT_LOOKUP_MIN
    """Tokens that have to agree before one is proposed."""
    longest: int = DEFAULT_LOOKUP_MAX
    """Tokens that are compared."""
    stored: int = 0
    """Tokens of finished answers that are kept for other requests; 0: none are."""
