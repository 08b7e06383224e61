"""What an engine lets MAX import, see `max_entries.for_engines`."""

from __future__ import annotations

from .max_entries import for_engines

__all__ = ["ARCHITECTURES"]

ARCHITECTURES = for_engines()
"""The entries of MAX's registry."""
