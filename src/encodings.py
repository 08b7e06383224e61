"""The number formats that can be asked for; imports nothing heavy."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

__all__ = [
    "BFLOAT16",
    "BLOCK_ENCODINGS",
    "DRAFT_ENCODINGS",
    "ENCODINGS",
    "FLOAT32",
    "FP8",
    "WeightEncodings",
]

FLOAT32: Final = "float32"
"""What a CPU computes in."""
BFLOAT16: Final = "bfloat16"
"""What GPUs compute in, where none is asked for; on a CPU, of weights alone."""
FP8: Final = "float8_e4m3fn"
"""On GPUs, for checkpoints in FP8 blocks."""

BLOCK_ENCODINGS: Final = ("q8_0", "q4_0", "q4_k", "q6_k")
"""Of weights on a CPU, in blocks as in a GGUF file."""

ENCODINGS: Final = (FLOAT32, BFLOAT16, FP8, *BLOCK_ENCODINGS)
"""Of a target; each supports some of them."""

DRAFT_ENCODINGS: Final = (FLOAT32, BFLOAT16, *BLOCK_ENCODINGS)
"""Of a draft's weights on a CPU."""


@dataclass(frozen=True)
class WeightEncodings:
    """How matrices are stored on a CPU, which computes in float32 whatever they are stored in."""

    target: str | None = None
    """One of `DRAFT_ENCODINGS`; None: as the checkpoint has them."""
    draft: str | None = None
    """Likewise."""
