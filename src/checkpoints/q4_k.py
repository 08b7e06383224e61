"""Numbers to blocks of GGUF's Q4_K: 256 codes of 4 bits, a scale and a minimum for each 32.

A number is `d * scale * code - dmin * minimum`: https://github.com/ggml-org/ggml/pull/1684 and
`block_q4_K` of ggml-common.h. How scales are found is ours.
"""

from __future__ import annotations

from typing import Final

import numpy as np
import numpy.typing as npt
from gguf import GGMLQuantizationType

from unispec.checkpoints.block_formats import BLOCKS, join_six_bits
from unispec.checkpoints.codes import inverse, nearest_codes

__all__ = ["to_q4_k"]

_PART: Final = 32
_PARTS: Final = 8
_LARGEST_CODE: Final = 15
_LARGEST_SCALE: Final = 63

_SPREADS: Final = (13.5, 14.0, 14.5, 15.0, 15.5, 16.0, 16.5)
"""Codes that the range of a part is spread over, to try; more than 15 cut its ends off."""

FloatTensor = npt.NDArray[np.float32]


def to_q4_k(rows: FloatTensor) -> npt.NDArray[np.uint8]:
    """Quantises rows `[R, K]` to blocks, uint8 `[R, K / 256 * 144]`.

    Scale and minimum of 32 numbers are those of least squared error among the candidates; all
    are then rounded to multiples of what 256 numbers share, and the codes chosen anew.
    """
    # Sums over the 32 numbers of a part run over the first axis, and so over whole vectors.
    parts = np.ascontiguousarray(rows.reshape(-1, _PART).T)  # [32, G]
    scales, minima = _fitted(parts)  # [G] each
    d, whole_scales = _shared(scales)
    dmin, whole_minima = _shared(minima)
    step = (d[:, None] * whole_scales).reshape(-1)  # [G]
    offset = (dmin[:, None] * whole_minima).reshape(-1)
    codes = nearest_codes(parts + offset, inverse(step), 0, _LARGEST_CODE)  # [32, G]

    blocks = np.empty(len(d), BLOCKS[GGMLQuantizationType.Q4_K])
    with np.errstate(over="ignore"):  # Who calls looks for infinite scales.
        blocks["d"], blocks["dmin"] = d, dmin
    blocks["scales"] = join_six_bits(whole_scales, whole_minima)
    # Two parts share 32 bytes: the first has the lower halves.
    pairs = codes.astype(np.uint8).T.reshape(-1, _PARTS // 2, 2, _PART)  # [blocks, 4, 2, 32]
    blocks["codes"] = (pairs[:, :, 0] | pairs[:, :, 1] << 4).reshape(len(d), -1)
    return blocks.view(np.uint8).reshape(len(rows), -1)


def _fitted(parts: FloatTensor) -> tuple[FloatTensor, FloatTensor]:
    """Scale s and minimum m of each part `[32, G]`, so that s * code - m is near: `[G]`, >= 0."""
    low = np.minimum(parts.min(axis=0), 0)
    width = parts.max(axis=0) - low
    above = parts - low
    total = parts.sum(axis=0)
    least: FloatTensor = np.full(len(low), np.inf, np.float32)
    best = np.zeros_like(low), -low
    for spread in _SPREADS:
        codes = nearest_codes(above, spread * inverse(width), 0, _LARGEST_CODE)
        # Least squares of s * code + offset for these codes.
        count, squares = codes.sum(axis=0), np.square(codes).sum(axis=0)
        product = (parts * codes).sum(axis=0)
        variance = squares - count * count / _PART
        scale = (product - count * total / _PART) * inverse(variance)
        offset = (total - scale * count) / _PART
        # The minimum is not negative, so the offset is not positive.
        forced = offset > 0
        scale = np.where(forced, product * inverse(squares), scale)
        offset = np.where(forced, np.float32(0), offset)
        error = np.square(parts - scale * codes - offset).sum(axis=0)
        better = error < least
        least = np.where(better, error, least)
        best = np.where(better, scale, best[0]), np.where(better, -offset, best[1])
    return best


def _shared(values: FloatTensor) -> tuple[FloatTensor, npt.NDArray[np.uint8]]:
    """Values `[G]` as float16 numbers of whole blocks `[G / 8]` times 0 to 63 `[G / 8, 8]`."""
    grouped = values.reshape(-1, _PARTS)
    with np.errstate(over="ignore"):
        shared = (grouped.max(axis=1) / _LARGEST_SCALE).astype(np.float16).astype(np.float32)
    whole = nearest_codes(grouped, inverse(shared)[:, None], 0, _LARGEST_SCALE)
    return shared, whole.astype(np.uint8)
