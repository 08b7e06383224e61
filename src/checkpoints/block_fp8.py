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

__all__ = ["dequantise_blocks"]

_SCALE: Final = "_scale_inv"


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
    plain = {name: tensor for name, tensor in tensors.items() if not name.endswith(_SCALE)}
    for scale_name, scale in tensors.items():
        if not scale_name.endswith(_SCALE):
            continue
        name = scale_name.removesuffix(_SCALE)
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


def _spread(scale: Tensor, shape: tuple[int, ...], block: Sequence[int]) -> npt.NDArray[np.float32]:
    """Every entry's scale, float32 of the matrix's shape."""
    rows = np.repeat(scale.astype(np.float32), block[0], axis=0)[: shape[0]]
    return np.repeat(rows, block[1], axis=1)[:, : shape[1]]
