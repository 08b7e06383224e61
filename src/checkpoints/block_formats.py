"""How the bytes of GGUF's block formats are laid out.

Formats: `block_q8_0`, `block_q4_0`, `block_q4_K`, `block_q5_K` and `block_q6_K` of
https://github.com/ggml-org/ggml/blob/master/src/ggml-common.h.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

import numpy as np
import numpy.typing as npt
from gguf import GGMLQuantizationType

__all__ = ["BLOCKS", "FLOAT_SCALES", "join_six_bits", "split_six_bits"]

BLOCKS: Final[Mapping[GGMLQuantizationType, np.dtype[Any]]] = {
    GGMLQuantizationType.Q8_0: np.dtype([("d", "<f2"), ("codes", "i1", 32)]),
    GGMLQuantizationType.Q4_0: np.dtype([("d", "<f2"), ("codes", "u1", 16)]),
    GGMLQuantizationType.Q4_K: np.dtype(
        [("d", "<f2"), ("dmin", "<f2"), ("scales", "u1", 12), ("codes", "u1", 128)]
    ),
    GGMLQuantizationType.Q5_K: np.dtype(
        [
            ("d", "<f2"),
            ("dmin", "<f2"),
            ("scales", "u1", 12),
            ("fifth_bits", "u1", 32),
            ("codes", "u1", 128),
        ]
    ),
    GGMLQuantizationType.Q6_K: np.dtype(
        [("codes", "u1", 128), ("upper_bits", "u1", 64), ("scales", "i1", 16), ("d", "<f2")]
    ),
}
"""One block of each format that stays as it is, as its bytes lie in a file."""

FLOAT_SCALES: Final = ("d", "dmin")
"""Fields of float16, by which all other numbers of a block are multiplied."""


def split_six_bits(
    packed: npt.NDArray[np.uint8],
) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.uint8]]:
    """Scales and minima of a block of Q4_K or Q5_K, uint8 `[..., 8]` of 0 to 63 each.

    Args:
        packed: `[..., 12]`. Bytes 0 to 3 hold the scales 0 to 3 in their lower six bits and the
            upper two bits of the scales 4 to 7 above them; bytes 4 to 7 the minima likewise;
            bytes 8 to 11 the lower four bits of the scales 4 to 7, and above them the minima's.
    """
    first, second, third = packed[..., :4], packed[..., 4:8], packed[..., 8:]
    scales = np.concatenate([first & 63, (third & 15) | (first >> 6 << 4)], axis=-1)
    minima = np.concatenate([second & 63, (third >> 4) | (second >> 6 << 4)], axis=-1)
    return scales, minima


def join_six_bits(
    scales: npt.NDArray[np.uint8], minima: npt.NDArray[np.uint8]
) -> npt.NDArray[np.uint8]:
    """Undoes `split_six_bits`: uint8 `[..., 8]` of 0 to 63 each to uint8 `[..., 12]`."""
    first = scales[..., :4] | (scales[..., 4:] >> 4 << 6)
    second = minima[..., :4] | (minima[..., 4:] >> 4 << 6)
    third = (scales[..., 4:] & 15) | (minima[..., 4:] & 15) << 4
    return np.concatenate([first, second, third], axis=-1)
