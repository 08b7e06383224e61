"""A weight matrix that stays as a file stores it: in blocks, or in numbers of 2 bytes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

import gguf
import numpy as np
import numpy.typing as npt
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

from unispec.checkpoints.block_formats import BLOCKS, FLOAT_SCALES, split_six_bits
from unispec.checkpoints.halves import HALVES, half_floats, not_finite

__all__ = ["KEPT", "StoredMatrix", "as_floats"]

KEPT: Final = (*BLOCKS, *HALVES)
"""Formats that a matrix stays in; all others become float32."""

# So many bytes stay in a processor's cache, with what is made of them.
_CHUNK_BYTES: Final = 1 << 18


@dataclass(frozen=True, eq=False)
class StoredMatrix:
    """A matrix `[N, K]` in the bytes of a GGUF format.

    Its rows are blocks of quantised numbers, or numbers of float16 or bfloat16, each a block.

    It is indexed as an array is, by rows alone: with a slice or with int64 row numbers.

    Raises:
        ValueError: the format is none of `KEPT`, or the bytes are not those of the shape.
    """

    kind: GGMLQuantizationType
    """The format."""
    shape: tuple[int, int]
    """N, K."""
    blocks: npt.NDArray[np.uint8]
    """`[N, row_bytes]`, as in a file; may be a view of one."""
    origin: str | None = None
    """What it was made of, the same for the same bytes alone; None where nobody can say."""

    def __post_init__(self) -> None:
        if self.kind not in KEPT:
            raise ValueError(f"{self.kind.name} is no format that is kept")
        block, block_bytes = GGML_QUANT_SIZES[self.kind]
        rows, columns = self.shape
        expected = (rows, columns // block * block_bytes)
        if columns % block or self.blocks.shape != expected or self.blocks.dtype != np.uint8:
            raise ValueError(
                f"blocks are {self.blocks.dtype} of shape {list(self.blocks.shape)}, a matrix"
                f" {list(self.shape)} in {self.kind.name} has uint8 of shape {list(expected)}"
            )

    @property
    def ndim(self) -> int:
        """It is a matrix."""
        return 2

    @property
    def size(self) -> int:
        """How many numbers it has."""
        return self.shape[0] * self.shape[1]

    @property
    def dtype(self) -> np.dtype[np.float32]:
        """Of its numbers, as `floats` gives them."""
        return np.dtype(np.float32)

    @property
    def is_quantised(self) -> bool:
        """Whether its numbers share scales, in blocks of many."""
        return self.kind not in HALVES

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, rows: slice | npt.NDArray[np.int64]) -> StoredMatrix:
        if not isinstance(rows, (slice, np.ndarray)):
            raise TypeError(f"rows are a slice or an array of row numbers, not {rows!r}")
        blocks = self.blocks[rows]
        return StoredMatrix(self.kind, (len(blocks), self.shape[1]), blocks)

    def reordered(self, order: npt.NDArray[np.int64], note: str) -> StoredMatrix:
        """Its rows in another order.

        Args:
            order: `[N]`, the row that each new one was.
            note: what the order is, for the origin.
        """
        origin = None if self.origin is None else f"{self.origin}, {note}"
        return StoredMatrix(self.kind, self.shape, self.blocks[order], origin)

    def floats(self) -> npt.NDArray[np.float32]:
        """Its numbers, float32 `[N, K]`."""
        if not self.is_quantised:
            return half_floats(self.blocks, self.kind)
        if not len(self):  # The gguf package cannot.
            return np.empty(self.shape, np.float32)
        flat = gguf.dequantize(self.blocks, self.kind)
        return np.require(flat.reshape(self.shape), np.float32, ["C", "A"])

    def fields(self) -> npt.NDArray[np.void]:
        """Its quantised blocks `[N, K / block]` as records, see `BLOCKS`."""
        return np.require(self.blocks, requirements=["C"]).view(BLOCKS[self.kind])

    def bad_numbers(self) -> int:
        """How many of its numbers, or of the float16 scales of its blocks, are not finite."""
        if not self.is_quantised:
            rows = max(1, _CHUNK_BYTES // max(1, self.blocks.shape[1]))
            parts = (self.blocks[start : start + rows] for start in range(0, len(self), rows))
            return sum(not_finite(part, self.kind) for part in parts)
        fields = self.fields()
        found = [fields[name] for name in FLOAT_SCALES if name in (fields.dtype.names or ())]
        return sum(int((~np.isfinite(scales)).sum()) for scales in found)

    def steps(self) -> npt.NDArray[np.float32]:
        """How far codes of its blocks are apart, float32 `[N, s]` for s equal parts of a row."""
        fields = self.fields()
        steps = np.abs(fields["d"].astype(np.float32))[..., None]  # [N, K / block, 1]
        if self.kind is GGMLQuantizationType.Q6_K:
            steps = steps * np.abs(fields["scales"].astype(np.float32))
        elif self.kind in (GGMLQuantizationType.Q4_K, GGMLQuantizationType.Q5_K):
            steps = steps * split_six_bits(fields["scales"])[0]
        return np.asarray(steps.reshape(len(self), -1), np.float32)


def as_floats(weight: npt.NDArray[Any] | StoredMatrix) -> npt.NDArray[np.float32]:
    """The numbers of a weight in float32; an array that is float32 already is not copied."""
    if isinstance(weight, StoredMatrix):
        return weight.floats()
    return weight.astype(np.float32, copy=False)
