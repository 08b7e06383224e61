"""Blocks of GGUF with random bytes and scales that are finite."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

from unispec.checkpoints import StoredMatrix

__all__ = ["KINDS", "SCALES", "random_blocks", "scales_of"]

SCALES = {
    GGMLQuantizationType.Q8_0: (0,),
    GGMLQuantizationType.Q4_0: (0,),
    GGMLQuantizationType.Q4_K: (0, 2),
    GGMLQuantizationType.Q5_K: (0, 2),
    GGMLQuantizationType.Q6_K: (208,),
}
"""Where the float16 numbers of a block lie, in bytes, as ggml-common.h has its structures."""
KINDS = list(SCALES)


def scales_of(tensor: StoredMatrix, place: int) -> npt.NDArray[np.float16]:
    """A writable view of the float16 at a place of each block, [N, K / block]."""
    rows, (block, block_bytes) = len(tensor), GGML_QUANT_SIZES[tensor.kind]
    blocks = tensor.blocks.reshape(rows, tensor.shape[1] // block, block_bytes)
    return blocks[..., place : place + 2].view(np.float16)[..., 0]


def random_blocks(
    kind: GGMLQuantizationType, rows: int, columns: int, *, seed: int = 0, origin: str | None = None
) -> StoredMatrix:
    random = np.random.default_rng(seed)
    block, block_bytes = GGML_QUANT_SIZES[kind]
    blocks = random.integers(0, 256, (rows, columns // block * block_bytes), np.uint8)
    tensor = StoredMatrix(kind, (rows, columns), blocks, origin)
    for place in SCALES[kind]:
        scales = scales_of(tensor, place)
        scales[:] = random.normal(size=scales.shape).astype(np.float16)
    return tensor
