"""Images that the caller of a step hands over as buffers."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from unispec.errors import InputError

from .encoder import MediaEncoder
from .inputs import ImageInputs
from .positions import rotary_ids

__all__ = ["step_image_features"]


def step_image_features(inputs: ImageInputs, encoder: MediaEncoder) -> npt.NDArray[np.float32]:
    """float32 `[n, H]`: the caller's features, or those of its patches.

    Args:
        inputs: `precomputed_image_embeddings`, or `pixel_values` with `grid_thws`.

    Raises:
        InputError: neither, or patches, grids, `cu_seqlens`, `max_seqlen` and
            `vision_position_ids` that contradict each other.
    """
    if inputs.pixel_values is None:
        if inputs.precomputed_image_embeddings is None:
            raise InputError(
                "image_token_indices is set without pixel_values and without"
                " precomputed_image_embeddings; set one of them"
            )
        features: npt.NDArray[np.float32] = inputs.precomputed_image_embeddings[0].to_numpy()
        return features
    if inputs.grid_thws is None:
        raise InputError("pixel_values is set without grid_thws; give the grid of each item")
    patches, grids = inputs.pixel_values[0].to_numpy(), inputs.grid_thws[0].to_numpy()
    if grids.ndim != 2 or grids.shape[1] != 3 or len(grids) == 0:
        raise InputError(
            f"grid_thws has shape {list(grids.shape)}; give [items, 3]: frames, rows, columns"
        )
    ends = np.cumsum(grids.prod(axis=1))
    if ends[-1] != len(patches):
        raise InputError(
            f"grid_thws {grids.tolist()} do not make the {len(patches)} patches of pixel_values;"
            " give the grid of each item"
        )
    _check("cu_seqlens", inputs.cu_seqlens, np.concatenate([[0], ends]))
    _check("max_seqlen", inputs.max_seqlen, grids.prod(axis=1).max(keepdims=True))
    ids = np.concatenate([rotary_ids(*map(int, grid)) for grid in grids])
    _check("vision_position_ids", inputs.vision_position_ids, ids)
    items = np.split(patches, ends[:-1])
    return np.concatenate(
        [encoder.encode(item, grid) for item, grid in zip(items, grids, strict=True)]
    )


def _check(name: str, found: Any, expected: npt.NDArray[Any]) -> None:
    if found is not None and not np.array_equal(found[0].to_numpy().reshape(-1), expected):
        raise InputError(f"{name} contradicts grid_thws; leave it out, it follows from the grids")
