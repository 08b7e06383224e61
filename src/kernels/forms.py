"""How the weights of a matrix are stored, as the kernels name it."""

from __future__ import annotations

from typing import Final

from gguf import GGMLQuantizationType
from max.dtype import DType

from unispec.kernels.packing import TILE, packed_shape

__all__ = ["FLOATS", "Form", "form_of", "is_whole", "stored_shape"]

Form = str
"""`"f32"`, `"bf16"` or `"f16"`, rows of floats, or a format of blocks such as `"q8_0"`."""

FLOATS: Final[dict[Form, DType]] = {
    "f32": DType.float32,
    "bf16": DType.bfloat16,
    "f16": DType.float16,
}
"""Forms whose weights are floats, row by row, and their dtypes."""


def form_of(kind: GGMLQuantizationType) -> Form:
    """The form of a format of GGUF."""
    return kind.name.lower()


def stored_shape(form: Form, rows: int, columns: int) -> tuple[DType, tuple[int, int]]:
    """Dtype and shape of the array of a matrix `[rows, columns]`."""
    if form in FLOATS:
        return FLOATS[form], (rows, columns)
    return DType.uint8, packed_shape(GGMLQuantizationType[form.upper()], (rows, columns))


def is_whole(rows: int) -> bool:
    """Whether they fill tiles, so that another matrix can stand right behind them."""
    return rows % TILE == 0
