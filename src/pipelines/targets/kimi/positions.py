"""Where the patches of a media item are: position embeddings, rotary ids, merge order.

All of it follows from the grid (frames, rows, columns) and is computed on the host.
"""

from __future__ import annotations

from typing import Final

import numpy as np
import numpy.typing as npt

__all__ = ["ROTARY_STRIDE", "merge_order", "position_embeddings", "rotary_ids"]

ROTARY_STRIDE: Final = 512
"""A patch's rotary id is its row times this plus its column."""

_CUBIC: Final = -0.75
_BASE: Final = 10000.0

Array = npt.NDArray[np.float32]


def position_embeddings(
    table: npt.NDArray[np.floating], frames: int, rows: int, columns: int
) -> Array:
    """What is added to the patches of one item, float32 `[frames * rows * columns, D]`.

    The learned table is stretched to the grid as torch's bicubic interpolation does
    (`align_corners` false, no antialiasing), and repeated for each frame. Items of more than
    one frame get a sine and cosine embedding of the frame's number on top; a single frame
    gets none, not that of number 0.

    Args:
        table: float `[height, width, D]`.
    """
    height, width, size = table.shape
    spatial = np.asarray(table, np.float64)
    if (rows, columns) != (height, width):
        down, across = _bicubic(height, rows), _bicubic(width, columns)
        spatial = np.einsum("ra,cb,abd->rcd", down, across, spatial)
    spatial = spatial.reshape(1, rows * columns, size)
    if frames > 1:
        frequencies = _BASE ** (-np.arange(size // 2) / (size // 2))
        angles = np.outer(np.arange(frames), frequencies)  # [frames, D / 2]
        time = np.concatenate([np.sin(angles), np.cos(angles)], axis=1)
        spatial = spatial + time[:, None]
    return spatial.reshape(-1, size).astype(np.float32)


def rotary_ids(frames: int, rows: int, columns: int) -> npt.NDArray[np.int64]:
    """int64 `[frames * rows * columns]`: every frame has the same ids."""
    row, column = np.mgrid[:rows, :columns]
    return np.tile((row * ROTARY_STRIDE + column).reshape(-1), frames).astype(np.int64)


def merge_order(frames: int, rows: int, columns: int) -> npt.NDArray[np.int64]:
    """Which patches make each feature, int64 `[rows * columns / 4, 4, frames]`.

    Two by two neighbours are joined row by row; frames are averaged.
    """
    patches = np.arange(frames * rows * columns).reshape(frames, rows // 2, 2, columns // 2, 2)
    return patches.transpose(1, 3, 2, 4, 0).reshape(-1, 4, frames)


def _bicubic(source: int, target: int) -> npt.NDArray[np.float64]:
    """Weights `[target, source]` that stretch a line; outside of it the end counts."""
    weights = np.zeros((target, source))
    centres = (np.arange(target) + 0.5) * source / target - 0.5
    for row, centre in enumerate(centres):
        first = int(np.floor(centre))
        for tap in range(first - 1, first + 3):
            weights[row, min(max(tap, 0), source - 1)] += _kernel(abs(centre - tap))
    return weights


def _kernel(distance: float) -> float:
    """Keys' cubic convolution (1981) with torch's parameter."""
    a = _CUBIC
    if distance <= 1:
        return ((a + 2) * distance - (a + 3)) * distance**2 + 1
    if distance < 2:
        return a * (((distance - 5) * distance + 8) * distance - 4)
    return 0.0
