"""Llama's decoder stack, and the models that differ from it by options."""

from __future__ import annotations

from .family import LLAMA
from .granite import GRANITE
from .mistral import MINISTRAL, MISTRAL
from .qwen2 import QWEN2
from .qwen3 import QWEN3

__all__ = ["GRANITE", "LLAMA", "MINISTRAL", "MISTRAL", "QWEN2", "QWEN3"]
