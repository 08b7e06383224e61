"""DeepSeek-V3: latent attention and routed experts, on one CPU or on up to 8 GPUs."""

from __future__ import annotations

from .family import DEEPSEEK_V3

__all__ = ["DEEPSEEK_V3"]
