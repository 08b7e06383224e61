"""Encodes media items, each only once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import numpy as np
import numpy.typing as npt
from max.driver import Buffer, Device
from max.engine import Model

from unispec.errors import InputError

from .config import VisionConfig
from .feature_cache import FeatureCache
from .positions import merge_order, position_embeddings, rotary_ids
from .preprocessing import MediaItem

__all__ = ["MediaEncoder"]

_KEPT_BYTES: Final = 2**30


class MediaEncoder:
    """Runs the vision graph and keeps what it made of the last items, in 1 GiB.

    Args:
        positions: the learned table, `[height, width, D]`.

    Attributes:
        encoded: how many items were run through the graph.
    """

    def __init__(
        self,
        model: Model,
        config: VisionConfig,
        positions: npt.NDArray[np.floating],
        device: Device,
    ) -> None:
        self.encoded = 0
        self._model = model
        self._config = config
        self._positions = positions
        self._device = device
        self._features = FeatureCache(_KEPT_BYTES)

    def __call__(self, item: MediaItem) -> npt.NDArray[np.float32]:
        """float32 `[N, H]`, the features of an item."""
        return self._features.get(item.digest, lambda: self.encode(item.patches, item.grid))

    def encode(
        self, patches: npt.NDArray[np.float32], grid: Sequence[int]
    ) -> npt.NDArray[np.float32]:
        """Runs the graph on one item; float32 `[N, H]`.

        Args:
            patches: `[L, 3, patch_size, patch_size]`.
            grid: frames, rows and columns of patches.

        Raises:
            InputError: a grid that the tower cannot read, or of another number of patches.
        """
        frames, rows, columns = (int(size) for size in grid)
        if min(frames, rows, columns) < 1 or rows % 2 or columns % 2:
            raise InputError(
                f"grid {[frames, rows, columns]} is not of pairs of rows and columns; pad the"
                " image to whole pairs of patches"
            )
        if frames > self._config.max_frames:
            raise InputError(
                f"grid {[frames, rows, columns]} has more than {self._config.max_frames} frames;"
                " split the video"
            )
        if len(patches) != frames * rows * columns:
            raise InputError(
                f"grid {[frames, rows, columns]} needs {frames * rows * columns} patches,"
                f" {len(patches)} are given; give the grid of these patches"
            )
        self.encoded += 1
        embeddings = position_embeddings(self._positions, frames, rows, columns)
        outputs = self._model.execute(
            self._floats(patches.reshape(len(patches), -1)),
            self._floats(embeddings),
            Buffer.from_numpy(rotary_ids(frames, rows, columns)).to(self._device),
            Buffer.from_numpy(merge_order(frames, rows, columns)).to(self._device),
        )
        features: npt.NDArray[np.float32] = outputs[0].to_numpy()
        return features

    def _floats(self, values: npt.NDArray[np.float32]) -> Buffer:
        return Buffer.from_numpy(np.ascontiguousarray(values)).to(self._device)
