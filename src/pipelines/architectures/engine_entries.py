"""What an engine registers with MAX: the targets of which MAX's own entries take no CPU."""

from __future__ import annotations

from unispec.pipelines.targets.deepseek import arch as deepseek
from unispec.pipelines.targets.kimi import arch as kimi
from unispec.pipelines.targets.llama import arch as llama

from .unified_dflash_kimi_k25 import arch as kimi_dflash
from .unified_mtp_deepseekV3 import arch as deepseek_mtp

__all__ = ["ARCHITECTURES"]

ARCHITECTURES = [
    deepseek.ARCHITECTURE,
    deepseek_mtp.ARCHITECTURE,
    kimi.ARCHITECTURE,
    kimi_dflash.ARCHITECTURE,
    llama.MISTRAL,
]
"""The entries of MAX's registry."""
