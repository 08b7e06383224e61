"""The speculative methods that have an architecture here; imports nothing heavy."""

from __future__ import annotations

from typing import Literal, get_args

__all__ = ["METHODS", "Method"]

Method = Literal["eagle"]

METHODS: tuple[Method, ...] = get_args(Method)
