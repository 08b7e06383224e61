"""Blocks of GGUF in the order in which the kernels read them.

16 rows of a matrix lie side by side as a tile, so that one load has the same column of all of them.
The blocks of a tile follow each other along K, and in each the parts of `_parts`, every number of
a part 16 times, once for each row. The last tile is filled up with rows of zero bytes.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Final

import numpy as np
import numpy.typing as npt
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

from unispec.checkpoints.block_formats import split_six_bits
from unispec.checkpoints.stored import StoredMatrix

__all__ = ["LAYOUT", "TILE", "pack", "packed_bytes", "packed_chunks", "packed_shape"]

LAYOUT: Final = 1
"""Counted up where the layout changes: what was packed in another one is of no use."""

TILE: Final = 16
"""Rows of a tile."""

_Q8_0: Final = GGMLQuantizationType.Q8_0
_Q4_0: Final = GGMLQuantizationType.Q4_0
_Q4_K: Final = GGMLQuantizationType.Q4_K
_Q5_K: Final = GGMLQuantizationType.Q5_K
_Q6_K: Final = GGMLQuantizationType.Q6_K

_BLOCK_BYTES: Final = {_Q8_0: 544, _Q4_0: 288, _Q4_K: 2368, _Q5_K: 2880, _Q6_K: 3360}
"""Of the 16 rows of a tile together."""

# Of what is read; what is made of it is about as large.
_CHUNK_BYTES: Final = 1 << 20

Bytes = npt.NDArray[np.uint8]


def packed_shape(kind: GGMLQuantizationType, shape: tuple[int, int]) -> tuple[int, int]:
    """Tiles of a matrix `[N, K]`, and bytes of each."""
    rows, columns = shape
    return -(-rows // TILE), columns // GGML_QUANT_SIZES[kind][0] * _BLOCK_BYTES[kind]


def packed_bytes(kind: GGMLQuantizationType, shape: tuple[int, int]) -> int:
    """Bytes of a packed matrix `[N, K]`."""
    tiles, tile_bytes = packed_shape(kind, shape)
    return tiles * tile_bytes


def pack(tensor: StoredMatrix) -> Bytes:
    """Packs a quantised matrix in memory, uint8 of `packed_shape`."""
    packed = np.empty(packed_shape(tensor.kind, tensor.shape), np.uint8)
    start = 0
    for chunk in packed_chunks(tensor):
        packed[start : start + len(chunk)] = chunk
        start += len(chunk)
    return packed


def packed_chunks(tensor: StoredMatrix) -> Iterator[Bytes]:
    """Packs a matrix a few tiles at a time: parts of `pack`, in order."""
    rows = TILE * max(1, _CHUNK_BYTES // (TILE * tensor.blocks.shape[1]))
    for start in range(0, len(tensor), rows):
        yield _side_by_side(tensor[start : start + rows])


def _side_by_side(tensor: StoredMatrix) -> Bytes:
    tiles, tile_bytes = packed_shape(tensor.kind, tensor.shape)
    missing = tiles * TILE - len(tensor)
    block_bytes = _BLOCK_BYTES[tensor.kind]
    packed = np.empty((tiles, tile_bytes // block_bytes, block_bytes), np.uint8)
    begin = 0
    for part in _parts(tensor):
        count, width = part.shape[-1], part.itemsize
        end = begin + count * TILE * width
        whole = np.pad(part, ((0, missing), (0, 0), (0, 0))) if missing else part
        in_tiles = whole.reshape(tiles, TILE, -1, count).transpose(0, 2, 3, 1)
        place = packed[:, :, begin:end].view(part.dtype)  # [tiles, blocks, count * 16]
        place.reshape(*place.shape[:2], count, TILE)[:] = in_tiles
        begin = end
    return packed.reshape(tiles, tile_bytes)


def _parts(tensor: StoredMatrix) -> Iterator[npt.NDArray[Any]]:
    """What a block has of each row, in the order of the layout: `[N, K / block, count]` each.

    - Q8_0: 1 float16 scale; 8 words of bytes, byte k of code k with 128 added.
    - Q4_0: 1 float16 scale; 4 words of halves, with 8 added.
    - Q4_K: 1 float16 d; 1 float16 dmin; 8 uint8 scales; 8 uint8 minima; for each 32 columns 4
      words of halves.
    - Q5_K: as Q4_K, and before the words 8 more, bit s of byte k for the fifth bit of code
      32 s + k.
    - Q6_K: 1 float16 d; 16 int8 scales; for each 64 columns 4 words, bits 2 i and 2 i + 1 of byte k
      for the upper bits of code 16 i + k, and then twice 4 words of halves; 32 is added.

    A word is 4 bytes of one row, so that the 16 rows have the same 4 columns side by side. Halves
    of 32 columns are 16 bytes: byte k has code k in its lower half and code k + 16 in its upper
    one.
    """
    fields = tensor.fields()
    yield fields["d"].view("<u2")[..., None]
    if tensor.kind is _Q8_0:
        yield _words(fields["codes"].view(np.uint8) ^ np.uint8(0x80))
    elif tensor.kind is _Q4_0:
        yield _words(fields["codes"])
    elif tensor.kind is _Q6_K:
        yield fields["scales"].view(np.uint8)
        yield _words(_six_bits(_six_bit_codes(fields["codes"], fields["upper_bits"])))
    else:
        yield fields["dmin"].view("<u2")[..., None]
        yield from split_six_bits(fields["scales"])
        if tensor.kind is _Q5_K:
            yield _words(fields["fifth_bits"])
        yield _words(_halves_of_pairs(fields["codes"]))


def _words(codes: Bytes) -> npt.NDArray[np.uint32]:
    """Bytes `[N, blocks, 4 n]` as words `[N, blocks, n]`."""
    return np.ascontiguousarray(codes).view("<u4")


def _halves_of_pairs(codes: Bytes) -> Bytes:
    """Halves `[N, blocks, 128]` of bytes whose lower halves are 32 codes, the upper the next 32."""
    pairs = codes.reshape(*codes.shape[:-1], 4, 2, 16)
    first, second = pairs[..., 0, :], pairs[..., 1, :]  # [N, blocks, 4, 16]
    lower, upper = (first & 15) | (second << 4), (first >> 4) | (second & 0xF0)
    return np.stack([lower, upper], axis=-2).reshape(codes.shape)


def _six_bits(codes: Bytes) -> Bytes:
    """Codes of Q6_K `[N, blocks, 256]` as they are stored, `[N, blocks, 192]`."""
    groups = codes.reshape(*codes.shape[:-1], 4, 4, 16)
    shifts = np.array([0, 2, 4, 6], np.uint8)[:, None]
    upper = np.bitwise_or.reduce(groups >> 4 << shifts, axis=-2, keepdims=True)
    halves = groups[..., ::2, :] & 15 | groups[..., 1::2, :] << 4  # [N, blocks, 4, 2, 16]
    return np.concatenate([upper, halves], axis=-2).reshape(*codes.shape[:-1], 192)


def _six_bit_codes(lower: Bytes, upper: Bytes) -> Bytes:
    """Codes of Q6_K in order, 0 to 63, `[N, blocks, 256]`; see `q6_k` for how they lie."""
    halves = lower.reshape(*lower.shape[:-1], 2, 64)
    codes = np.stack([halves & 15, halves >> 4], axis=-2)  # [N, blocks, 2, 2, 64]
    shifts = np.array([0, 2, 4, 6], np.uint8)[:, None]
    bits = upper.reshape(*upper.shape[:-1], 2, 1, 32) >> shifts & 3  # [N, blocks, 2, 4, 32]
    joined: Bytes = codes.reshape(bits.shape) | bits << 4
    return joined.reshape(*lower.shape[:-1], 256)
