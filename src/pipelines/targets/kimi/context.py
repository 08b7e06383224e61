"""Prompts with media items: placeholders made as wide as their features, and what stands there."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from max.pipelines.context import (
    ImageMetadata,
    TextAndVisionContext,
    TokenBuffer,
)

from unispec.errors import InputError
from unispec.pipelines.runtime.prompts import Prompt

from .preprocessing import MediaItem

__all__ = ["MediaPrompt", "media_items", "widen_placeholders"]

_GRIDS = "grid_thws"


def widen_placeholders(
    tokens: Sequence[int], items: Sequence[MediaItem], placeholder: int, *, prompt: str
) -> list[int]:
    """Repeats each placeholder once for each feature of its item.

    Args:
        tokens: the prompt, one placeholder an item.

    Raises:
        InputError: another number of placeholders than of items.
    """
    found = sum(token == placeholder for token in tokens)
    if found != len(items):
        raise InputError(
            f"{prompt} has {found} image placeholders (token {placeholder}) and {len(items)}"
            " images are given; give one image for each placeholder"
        )
    rest = iter(items)
    widened: list[int] = []
    for token in tokens:
        widened += [token] * (next(rest).num_features if token == placeholder else 1)
    return widened


@dataclass(frozen=True)
class MediaPrompt(Prompt):
    """A prompt whose widened placeholders stand for media items.

    MAX makes `image_hash` part of the names of cache pages, so that another image at the same
    place does not find them.
    """

    items: Sequence[MediaItem]
    """In the order of their placeholders."""
    placeholder: int
    """Their token id."""

    def context(self, **fields: Any) -> TextAndVisionContext:
        """The request."""
        images, end = [], 0
        tokens = list(self.tokens)
        for item in self.items:
            start = tokens.index(self.placeholder, end)
            end = start + item.num_features
            digest = int(item.digest[:15], 16)
            images.append(
                ImageMetadata(
                    start_idx=start, end_idx=end, pixel_values=item.patches, image_hash=digest
                )
            )
        return TextAndVisionContext(
            tokens=TokenBuffer(np.array(tokens, np.int64)),
            vision_token_ids=[self.placeholder],
            images=images,
            # The grids have no field of their own.
            extra_model_args={
                _GRIDS: np.array([item.grid for item in self.items], np.int64).reshape(-1, 3)
            },
            **fields,
        )


def media_items(context: Any) -> list[tuple[int, MediaItem]]:
    """Where each item of a request begins among its tokens, and the item."""
    images = getattr(context, "images", ())
    grids = getattr(context, "extra_model_args", {}).get(_GRIDS, ())
    return [
        (
            image.start_idx,
            MediaItem(image.pixel_values, (int(t), int(h), int(w)), f"{image.image_hash:x}"),
        )
        for image, (t, h, w) in zip(images, grids, strict=True)
    ]
