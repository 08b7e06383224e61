"""Whole numbers that stand for floats."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

__all__ = ["inverse", "nearest_codes"]

FloatTensor = npt.NDArray[np.float32]


def nearest_codes(
    values: FloatTensor, inverse_step: FloatTensor, lowest: int, highest: int
) -> FloatTensor:
    """The codes whose multiples of a step are nearest, as floats.

    Args:
        inverse_step: broadcast against the values; 0 makes all codes 0.
    """
    codes: FloatTensor = np.clip(np.rint(values * inverse_step), lowest, highest)
    return codes


def inverse(values: FloatTensor) -> FloatTensor:
    """1 / values, and 0 of 0."""
    return np.divide(1, values, out=np.zeros_like(values), where=values != 0)
