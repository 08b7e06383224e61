"""Whether a head is the embedding: config.json asks for it, the tensors decide."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

import numpy as np

from unispec.checkpoints.tensors import Tensor

__all__ = ["EMBEDDING", "HEAD", "same_rows", "tied_names"]

EMBEDDING: Final = "embed_tokens.weight"
"""The embedding's canonical name."""
HEAD: Final = "lm_head.weight"
"""The head's canonical name."""

_ROWS: Final = 4096


def tied_names(tensors: Mapping[str, Tensor], names: Mapping[str, str]) -> dict[str, str]:
    """The names of a checkpoint whose config.json ties the head to the embedding.

    As transformers 5 does, they are tied where they are equal or one of them is missing. A head
    that differs is a head of its own: the file was trained that way, and config.json is wrong.

    Args:
        tensors: the checkpoint, under its own names.
        names: canonical names to the checkpoint's, see `canonical_names`.

    Returns:
        The names; `lm_head.weight` is among them only where it is not the embedding.
    """
    found = dict(names)
    if HEAD not in found:
        return found
    if EMBEDDING not in found:
        found[EMBEDDING] = found.pop(HEAD)
    elif same_rows(tensors[found[EMBEDDING]], tensors[found[HEAD]]):
        del found[HEAD]
    return found


def same_rows(one: Tensor, other: Tensor) -> bool:
    """Whether two matrices have the same shape and values."""
    if one.shape != other.shape:
        return False
    # In parts: the first difference ends it, and no array of all comparisons is made.
    return all(
        np.array_equal(one[start : start + _ROWS], other[start : start + _ROWS])
        for start in range(0, len(one), _ROWS)
    )
