"""FP8 weights with one scale for each block of a matrix, as DeepSeek-V3 publishes them.

Format: README_WEIGHTS.md of deepseek-ai/DeepSeek-V3. A matrix `name.weight` of float8 e4m3 has
`name.weight_scale_inv`, float32 with one entry for each block; despite its name it is multiplied.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Final

import numpy as np
import numpy.typing as npt

from unispec.checkpoints.tensors import Tensor
from unispec.errors import InputError

__all__ = ["SCALE", "dequantise_blocks", "quantise_blocks"]

SCALE: Final = "_scale_inv"
"""How the name of a matrix's scales ends, behind that of the matrix."""


def dequantise_blocks(
    tensors: Mapping[str, Tensor], block: Sequence[int], *, source: str
) -> dict[str, Tensor]:
    """Multiplies every matrix that has scales by them and drops the scales.

    Args:
        tensors: the checkpoint's tensors by name; float8 as bytes, as `read_tensors` gives it.
        block: rows and columns of a block; the last ones may be cut off by the matrix's end.

    Raises:
        InputError: scales without a matrix, or of another shape than its blocks.
    """
    plain = {name: tensor for name, tensor in tensors.items() if not name.endswith(SCALE)}
    for scale_name, scale in tensors.items():
        if not scale_name.endswith(SCALE):
            continue
        name = scale_name.removesuffix(SCALE)
        if name not in plain:
            raise InputError(
                f"{source} has {scale_name!r} without {name!r}: give all files of the checkpoint"
            )
        weight = plain[name]
        blocks = [-(-size // width) for size, width in zip(weight.shape, block, strict=False)]
        if weight.ndim != 2 or list(scale.shape) != blocks:
            raise InputError(
                f"{source}: {scale_name!r} has shape {list(scale.shape)}, {blocks} is expected for"
                f" {list(weight.shape)} in blocks of {list(block)}: correct weight_block_size in"
                " config.json"
            )
        values = _E4M3[weight] if weight.dtype == np.uint8 else weight.astype(np.float32)
        plain[name] = values * _spread(scale, weight.shape, block)
    return plain


def quantise_blocks(
    matrix: Tensor, block: Sequence[int]
) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.float32]]:
    """Rounds a matrix to float8 e4m3, each block by the scale that makes its largest entry 448.

    Args:
        matrix: `[rows, columns]`.
        block: rows and columns of a block; the last ones may be cut off by the matrix's end.

    Returns:
        Bytes `[rows, columns]`, NaN for what is not finite, and a scale for each block, which is 1
        where all of it is 0, or so small that the scale would be.
    """
    rows, columns = block
    starts = np.arange(0, matrix.shape[1], columns)
    codes = np.empty(matrix.shape, np.uint8)
    scales = np.empty([-(-size // width) for size, width in zip(matrix.shape, block, strict=True)])
    # A row of blocks at a time: what is made on the way stays in the processor's cache.
    for index, first in enumerate(range(0, len(matrix), rows)):
        part = matrix[first : first + rows].astype(np.float32)
        largest = np.maximum.reduceat(np.abs(part).max(axis=0), starts)
        scale = (largest / _LARGEST).astype(np.float32)
        scales[index] = scale = np.where(scale == 0, np.float32(1), scale)
        with np.errstate(invalid="ignore"):  # of an infinity, which becomes NaN
            quotient = part / np.repeat(scale, columns)[: part.shape[1]]
        codes[first : first + rows] = _as_e4m3(quotient)
    return codes, scales.astype(np.float32)


def _as_e4m3(values: npt.NDArray[np.float32]) -> npt.NDArray[np.uint8]:
    """The byte of the nearest float8 e4m3, of two equally near ones the even; beyond 448: 448."""
    bits = values.view(np.uint32)
    magnitude = bits & 0x7FFFFFFF
    # Of 23 bits of mantissa 3 stay; what is carried over goes to the exponent.
    code = ((magnitude + 0x7FFFF + ((magnitude >> 20) & 1)) >> 20) - _NO_EXPONENT
    code = np.minimum(code.view(np.int32), _LARGEST_CODE)
    # Below the smallest normal number steps are of 2 ** -9.
    small = magnitude < _SMALLEST_NORMAL
    code[small] = np.rint(np.abs(values[small]) * 2.0**9)
    code[magnitude > _INFINITE] = _NAN_CODE
    return (code | (bits >> 24 & 0x80).view(np.int32)).astype(np.uint8)


def _e4m3_values() -> npt.NDArray[np.float32]:
    """The value of each byte as float8 e4m3: sign, 4 bits of exponent, 3 of mantissa.

    Format: FP8 Formats for Deep Learning, arXiv 2209.05433, table 1; no infinities, one NaN.
    """
    code = np.arange(256)
    sign = np.where(code & 0x80, -1.0, 1.0)
    exponent, mantissa = (code >> 3) & 0xF, code & 0x7
    normal = (8 + mantissa) * 2.0 ** (exponent - 10)
    subnormal = mantissa * 2.0**-9
    values = sign * np.where(exponent == 0, subnormal, normal)
    values[code & 0x7F == 0x7F] = np.nan
    return values.astype(np.float32)


_E4M3: Final = _e4m3_values()
_LARGEST: Final = np.float32(448)
_LARGEST_CODE: Final = 0x7E
_NAN_CODE: Final = 0x7F
_INFINITE: Final = np.float32(np.inf).view(np.uint32)
_SMALLEST_NORMAL: Final = np.float32(2**-6).view(np.uint32)
_NO_EXPONENT: Final = np.uint32((127 - 7) << 3)
"""A float32's exponent and three bits of mantissa, less this, are the code of the same number."""


def _spread(scale: Tensor, shape: tuple[int, ...], block: Sequence[int]) -> npt.NDArray[np.float32]:
    """Every entry's scale, float32 of the matrix's shape."""
    rows = np.repeat(scale.astype(np.float32), block[0], axis=0)[: shape[0]]
    return np.repeat(rows, block[1], axis=1)[:, : shape[1]]
