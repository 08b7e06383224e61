"""Llama's decoder stack, and beside it the models that differ from it by options, a file each."""

from __future__ import annotations

from .family import LLAMA

__all__ = ["LLAMA"]
