"""Images and frames of videos to patches, as Kimi K2.5's processor makes them."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, TypeAlias

import numpy as np
import numpy.typing as npt
from PIL import Image

from unispec.errors import InputError
from unispec.images import open_image

__all__ = ["Media", "MediaItem", "patches_of"]

_MAX_PATCHES: Final = 16384
_MAX_FRAME_PATCHES: Final = 4096
_MAX_SIDE: Final = 512
_MERGE: Final = 2

Media: TypeAlias = "str | Path | bytes | Image.Image | Sequence[Image.Image]"
"""An image by its path, its file's bytes or decoded, or the frames of a part of a video."""


@dataclass(frozen=True)
class MediaItem:
    """One image, or up to four frames of a video, ready for the vision tower."""

    patches: npt.NDArray[np.float32]
    """`[frames * rows * columns, 3, patch_size, patch_size]`, values from -1 to 1."""
    grid: tuple[int, int, int]
    """Frames, rows and columns of patches."""
    digest: str
    """Of patches and grid: equal items have equal features."""

    @property
    def num_features(self) -> int:
        """Tokens that the item stands for: two by two patches of all frames make one."""
        _, rows, columns = self.grid
        return rows * columns // _MERGE**2


def patches_of(media: Media, *, patch_size: int, max_frames: int) -> MediaItem:
    """Scales, pads and cuts a media item into patches.

    An image larger than the tower reads is made smaller, never larger. Its right and bottom are
    padded with black to whole pairs of patches.

    Args:
        patch_size: pixels of a patch's side.

    Raises:
        InputError: an image that cannot be read, no frame, or too many.
    """
    is_video = isinstance(media, Sequence) and not isinstance(media, str | bytes)
    frames = [open_image(frame) for frame in media] if is_video else [open_image(media)]  # type: ignore[arg-type, union-attr]
    if not 1 <= len(frames) <= max_frames:
        raise InputError(
            f"a part of a video has {len(frames)} frames; give 1 to {max_frames} at a time"
        )
    width, height = _fitting(
        frames[0].size, patch_size, _MAX_FRAME_PATCHES if is_video else _MAX_PATCHES
    )
    step = patch_size * _MERGE
    columns, rows = -(-width // step) * _MERGE, -(-height // step) * _MERGE
    pixels = np.zeros((len(frames), rows * patch_size, columns * patch_size, 3), np.float32)
    for index, frame in enumerate(frames):
        scaled = frame.resize((width, height), Image.Resampling.BICUBIC)
        pixels[index, :height, :width] = np.asarray(scaled, np.float32)
    pixels = (pixels / np.float32(255) - np.float32(0.5)) / np.float32(0.5)
    grid = (len(frames), rows, columns)
    cut = pixels.reshape(len(frames), rows, patch_size, columns, patch_size, 3)
    patches = np.ascontiguousarray(
        cut.transpose(0, 1, 3, 5, 2, 4).reshape(-1, 3, patch_size, patch_size)
    )
    digest = hashlib.sha256(repr(grid).encode() + patches.tobytes()).hexdigest()
    return MediaItem(patches, grid, digest)


def _fitting(size: tuple[int, int], patch_size: int, max_patches: int) -> tuple[int, int]:
    """Width and height in pixels after scaling, before padding."""
    width, height = size
    area = max(1, width // patch_size) * max(1, height // patch_size)
    side = _MAX_SIDE * patch_size
    scale = min(1.0, math.sqrt(max_patches / area), side / width, side / height)
    return (
        min(max(1, int(width * scale)), side),
        min(max(1, int(height * scale)), side),
    )
