"""Whether a matrix is what another one was before it was rounded."""

from __future__ import annotations

from typing import Final

import numpy as np
import numpy.typing as npt

from unispec.checkpoints.halves import half_bytes
from unispec.checkpoints.stored import StoredMatrix, as_floats
from unispec.checkpoints.tensors import Weight

__all__ = ["is_rounded"]

_ROWS: Final = 4096

_SLACK: Final = 1.5
"""By how much an error may exceed that of even rounding: some codes are cut, scales are rounded."""


def is_rounded(one: Weight, stored: StoredMatrix) -> bool:
    """Whether a matrix differs from a stored one by no more than the latter's format rounds.

    Of float16 and bfloat16 it must be the same once it is rounded itself. Numbers that are
    quantised to steps of s are off by s / sqrt(12) in the mean of squares.

    Args:
        one: `[N, K]` of floating point.
    """
    if one.shape != stored.shape:
        return False
    same = _within_steps if stored.is_quantised else _same_rounded
    return all(
        same(as_floats(one[start : start + _ROWS]), stored[start : start + _ROWS])
        for start in range(0, len(one), _ROWS)
    )


def _within_steps(one: npt.NDArray[np.float32], blocks: StoredMatrix) -> bool:
    found = np.square(one - blocks.floats()).mean(dtype=np.float64)
    rounding = np.square(blocks.steps()).mean(dtype=np.float64) / 12
    return bool(found <= _SLACK**2 * rounding)


def _same_rounded(one: npt.NDArray[np.float32], halves: StoredMatrix) -> bool:
    return np.array_equal(half_bytes(one, halves.kind), halves.blocks)
