"""What a contender's process is told."""

from __future__ import annotations

from dataclasses import dataclass

from unispec.methods import Method

__all__ = ["Job"]


@dataclass(frozen=True, kw_only=True)
class Job:
    """What to load, and how it runs."""

    target: str
    """Folder."""
    draft_folder: str
    method: Method
    draft_tokens: int
    acceptance: float
    """Probability with which each draft stands, 0 to 1."""
    devices: str
    """As `EngineConfig` has it."""
    rows: int
    """Of the largest batch."""
    context: int
    """Tokens of a prompt."""
    max_length: int
    """Longest sequence, in tokens."""
