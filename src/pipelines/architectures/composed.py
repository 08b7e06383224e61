"""The composed classes by name: pickle looks for them here, in processes that composed none yet."""

from __future__ import annotations

from typing import Any

from .registry import pairs

__all__: list[str] = []


def __getattr__(name: str) -> Any:
    for pair in pairs():
        if pair.model.__name__ == name:
            return pair.model
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
