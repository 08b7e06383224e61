"""Numbers to blocks of GGUF's Q6_K: 256 codes of 6 bits, a scale for each 16.

A number is `d * scale * code` with codes -32 to 31 and scales of int8:
https://github.com/ggml-org/ggml/pull/1684 and `block_q6_K` of ggml-common.h. How scales are found
is ours.
"""

from __future__ import annotations

from typing import Final

import numpy as np
import numpy.typing as npt
from gguf import GGMLQuantizationType

from unispec.checkpoints.block_formats import BLOCKS
from unispec.checkpoints.codes import inverse, nearest_codes

__all__ = ["to_q6_k"]

_PART: Final = 16
_PARTS: Final = 16
_CODES: Final = -32, 31
_LARGEST_SCALE: Final = 127

_PEAKS: Final = (30.0, 30.75, 31.5, 32.0, 32.5)
"""Minus the codes, to try, of the number that is farthest from 0."""

FloatTensor = npt.NDArray[np.float32]


def to_q6_k(rows: FloatTensor) -> npt.NDArray[np.uint8]:
    """Quantises rows `[R, K]` to blocks, uint8 `[R, K / 256 * 210]`.

    The scale of 16 numbers is that of least squared error among the candidates; all are then
    rounded to multiples of what 256 numbers share, and the codes chosen anew.
    """
    # Sums over the 16 numbers of a part run over the first axis, and so over whole vectors.
    parts = np.ascontiguousarray(rows.reshape(-1, _PART).T)  # [16, G]
    scales = _fitted(parts).reshape(-1, _PARTS)  # [blocks, 16]
    with np.errstate(over="ignore"):  # Who calls looks for infinite scales.
        d = (np.abs(scales).max(axis=1) / _LARGEST_SCALE).astype(np.float16)
    shared = d.astype(np.float32)[:, None]  # [blocks, 1]
    whole = nearest_codes(scales, inverse(shared), -_LARGEST_SCALE, _LARGEST_SCALE)
    codes = nearest_codes(parts, inverse((shared * whole).reshape(-1)), *_CODES)  # [16, G]

    blocks = np.empty(len(d), BLOCKS[GGMLQuantizationType.Q6_K])
    blocks["d"] = d
    blocks["scales"] = whole.astype(np.int8)
    # In each half of a block: number 32 j + l has its upper bits in byte l, and its lower ones in
    # byte 32 (j % 2) + l.
    stored = (codes - _CODES[0]).astype(np.uint8)
    quarters = stored.T.reshape(-1, 2, 4, 32)  # [blocks, 2, j, l]
    lower = quarters[:, :, :2] & 15 | (quarters[:, :, 2:] & 15) << 4  # [blocks, 2, 2, 32]
    shifts = np.array([0, 2, 4, 6], np.uint8)[:, None]
    upper = np.bitwise_or.reduce(quarters >> 4 << shifts, axis=2)  # [blocks, 2, 32]
    blocks["codes"] = lower.reshape(len(d), -1)
    blocks["upper_bits"] = upper.reshape(len(d), -1)
    return blocks.view(np.uint8).reshape(len(rows), -1)


def _fitted(parts: FloatTensor) -> FloatTensor:
    """The scale s of each part `[16, G]`, so that s * code is near: `[G]`."""
    farthest = np.abs(parts).argmax(axis=0)
    peak = np.take_along_axis(parts, farthest[None], axis=0)[0]  # [G], signed
    gained: FloatTensor = np.full(len(peak), -1, np.float32)
    best: FloatTensor = np.zeros_like(peak)
    for candidate in _PEAKS:
        codes = nearest_codes(parts, -candidate * inverse(peak), *_CODES)
        # Least squares for these codes; the error is what is gained less than all squares.
        product, squares = (parts * codes).sum(axis=0), np.square(codes).sum(axis=0)
        scale = product * inverse(squares)
        gain = product * scale
        better = gain > gained
        gained = np.where(better, gain, gained)
        best = np.where(better, scale, best)
    return best
