"""What an engine registers with MAX: DeepSeek-V3 and Kimi K2.5, of which MAX's take no CPU."""

from __future__ import annotations

from .deepseekV3 import arch as deepseek
from .kimik2_5 import arch as kimi
from .unified_dflash_kimi_k25 import arch as kimi_dflash
from .unified_mtp_deepseekV3 import arch as deepseek_mtp

__all__ = ["ARCHITECTURES"]

ARCHITECTURES = [
    deepseek.ARCHITECTURE,
    deepseek_mtp.ARCHITECTURE,
    kimi.ARCHITECTURE,
    kimi_dflash.ARCHITECTURE,
]
"""The entries of MAX's registry."""
