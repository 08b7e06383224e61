"""Numbers of 2 bytes: float16 and bfloat16, which numpy lacks."""

from __future__ import annotations

from typing import Final

import numpy as np
import numpy.typing as npt
from gguf import GGMLQuantizationType

__all__ = ["HALVES", "half_bytes", "half_floats", "not_finite"]

_F16: Final = GGMLQuantizationType.F16
_BF16: Final = GGMLQuantizationType.BF16

HALVES: Final = (_F16, _BF16)
"""Both formats."""

_EXPONENT: Final = {_F16: np.uint16(0x7C00), _BF16: np.uint16(0x7F80)}
"""Bits that are all set in what is NaN or infinite."""


def half_floats(
    stored: npt.NDArray[np.uint8], kind: GGMLQuantizationType
) -> npt.NDArray[np.float32]:
    """Bytes `[..., 2 K]` as the same numbers in float32, `[..., K]`."""
    if kind is _F16:
        return stored.view("<f2").astype(np.float32)
    # bfloat16 is the upper half of a float32.
    wide = stored.view("<u2").astype(np.uint32)
    wide <<= 16
    return wide.view(np.float32)


def half_bytes(
    floats: npt.NDArray[np.float32], kind: GGMLQuantizationType
) -> npt.NDArray[np.uint8]:
    """Numbers `[..., K]` rounded to nearest, ties to even, as bytes `[..., 2 K]`."""
    floats = np.ascontiguousarray(floats)
    if kind is _F16:
        with np.errstate(over="ignore"):
            return floats.astype("<f2").view(np.uint8)
    bits = floats.view(np.uint32)
    # A carry out of the lower half rounds up. NaN is kept from becoming infinite, or a zero.
    upper = bits >> 16
    rounded = np.where(np.isnan(floats), upper | 0x40, (bits + (0x7FFF + (upper & 1))) >> 16)
    return rounded.astype("<u2").view(np.uint8)


def not_finite(stored: npt.NDArray[np.uint8], kind: GGMLQuantizationType) -> int:
    """How many numbers in bytes `[..., 2 K]` are NaN or infinite."""
    exponent = _EXPONENT[kind]
    return int(np.count_nonzero((stored.view("<u2") & exponent) == exponent))
