"""Kimi K2.5: a DeepSeek-V3 stack that reads images through a vision tower."""

from __future__ import annotations

from .family import KIMI_K25

__all__ = ["KIMI_K25"]
