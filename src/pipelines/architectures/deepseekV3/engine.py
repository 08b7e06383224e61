"""What an engine registers with MAX: DeepSeek-V3, of which MAX's own takes no CPU."""

from __future__ import annotations

from ..unified_mtp_deepseekV3 import arch as mtp
from . import arch

__all__ = ["ARCHITECTURES"]

ARCHITECTURES = [arch.ARCHITECTURE, mtp.ARCHITECTURE]
"""The entries of MAX's registry."""
