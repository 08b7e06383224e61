"""The number formats that can be asked for; imports nothing heavy."""

from __future__ import annotations

from typing import Final

__all__ = ["BFLOAT16", "ENCODINGS", "FLOAT32", "FP8"]

FLOAT32: Final = "float32"
"""The only one on a CPU."""
BFLOAT16: Final = "bfloat16"
"""On GPUs, where none is asked for."""
FP8: Final = "float8_e4m3fn"
"""On GPUs, for checkpoints in FP8 blocks."""

ENCODINGS: Final = (FLOAT32, BFLOAT16, FP8)
"""As MAX names them; a target supports some of them."""
