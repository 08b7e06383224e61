"""4-bit integers packed eight to a word, as compressed-tensors writes them (`pack-quantized`).

Format: `PackedQuantizationCompressor` of vllm-project/compressed-tensors. In place of a matrix
`name.weight` there are `name.weight_packed`, int32 words whose lowest four bits are the first
column; `name.weight_scale`, a row's factor for each group of columns; and `name.weight_shape`. A
value is stored with 8 added to it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Final

import numpy as np
import numpy.typing as npt

from unispec.errors import InputError

if TYPE_CHECKING:
    # Which asks here how much a word holds.
    from unispec.checkpoints.tensors import Tensor

__all__ = ["OTHER_PARTS", "PACKED", "WORD", "dequantise_packed"]

PACKED: Final = ".weight_packed"
"""How the name of a tensor of words ends."""
WORD: Final = 8
"""Values in a word."""
OTHER_PARTS: Final = (".weight_scale", ".weight_shape")
"""How the names of its other parts end."""
_PARTS: Final = (PACKED, *OTHER_PARTS)
_OFFSET: Final = 8


def dequantise_packed(
    tensors: Mapping[str, Tensor], group_size: int, *, source: str
) -> dict[str, Tensor]:
    """Unpacks every packed matrix, multiplies it by its scales and drops its parts.

    Which matrices are packed is told by the names; the others stay as they are.

    Args:
        group_size: columns that share a scale; a row's last group may be cut off by its end.

    Raises:
        InputError: a matrix of which a part is missing, of another type or shape, or which is
            there plain as well.
    """
    plain = {name: tensor for name, tensor in tensors.items() if not name.endswith(_PARTS)}
    # In the order of the checkpoint, each once.
    for layer in dict.fromkeys(
        name.rpartition(".")[0] for name in tensors if name.endswith(_PARTS)
    ):
        names = [layer + part for part in _PARTS]
        if missing := [name for name in names if name not in tensors]:
            there = next(name for name in names if name in tensors)
            raise InputError(
                f"{source} has {there!r} without {missing[0]!r}: give all files of the checkpoint"
            )
        weight = f"{layer}.weight"
        if weight in plain:
            raise InputError(f"{source} has both {names[0]!r} and {weight!r}: remove one of them")
        packed, scale, shape = (tensors[name] for name in names)
        _check(layer, packed, scale, shape, group_size, source)
        columns = int(shape[1])
        scales = np.repeat(scale.astype(np.float32), group_size, axis=1)[:, :columns]
        plain[weight] = _unpacked(packed, columns) * scales
    return plain


def _check(
    layer: str, packed: Tensor, scale: Tensor, shape: Tensor, group_size: int, source: str
) -> None:
    if packed.dtype != np.int32 or not np.issubdtype(scale.dtype, np.floating):
        raise InputError(
            f"{source}: {layer}.weight_packed has dtype {packed.dtype} and its scale {scale.dtype},"
            " int32 and floating point are expected: use a checkpoint of format pack-quantized"
        )
    if shape.shape != (2,) or not np.issubdtype(shape.dtype, np.integer):
        raise InputError(
            f"{source}: {layer}.weight_shape has shape {list(shape.shape)} and dtype"
            f" {shape.dtype}, two integers are expected: download the checkpoint again"
        )
    rows, columns = shape.tolist()
    expected = [(rows, -(-columns // size)) for size in (WORD, group_size)]
    if [packed.shape, scale.shape] != expected:
        raise InputError(
            f"{source}: {layer}.weight_packed has shape {list(packed.shape)} and its scale"
            f" {list(scale.shape)}, {list(expected[0])} and {list(expected[1])} are expected for"
            f" {[rows, columns]} in groups of {group_size}: correct group_size in config.json, or"
            " download the checkpoint again"
        )


def _unpacked(packed: Tensor, columns: int) -> npt.NDArray[np.int8]:
    """The values of int32 words `[rows, words]`, -8 to 7, without what fills the last word."""
    # Little-endian: a word's bytes come in the order of its columns, two in each byte.
    pairs = np.ascontiguousarray(packed.astype("<i4", copy=False)).view(np.uint8)
    values = np.stack([pairs & 0xF, pairs >> 4], axis=-1).reshape(len(packed), -1)
    return values[:, :columns].astype(np.int8) - np.int8(_OFFSET)
