"""Whether a head is the embedding: config.json asks for it, the tensors decide."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

import numpy as np

from unispec.checkpoints.stored import StoredMatrix
from unispec.checkpoints.tensors import Tensor, Weight

__all__ = ["EMBEDDING", "HEAD", "same_rows", "tied_names"]

EMBEDDING: Final = "embed_tokens.weight"
"""The embedding's canonical name."""
HEAD: Final = "lm_head.weight"
"""The head's canonical name."""

_ROWS: Final = 4096


def tied_names(tensors: Mapping[str, Weight], names: Mapping[str, str]) -> dict[str, str]:
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


def same_rows(one: Weight, other: Weight) -> bool:
    """Whether two matrices have the same shape and values, quantised ones in the same format."""
    if one.shape != other.shape:
        return False
    if isinstance(one, StoredMatrix) and isinstance(other, StoredMatrix) and one.kind == other.kind:
        return same_rows(one.blocks, other.blocks)
    if _is_quantised(one) or _is_quantised(other):
        return False
    # In parts: the first difference ends it, and no array of all comparisons is made.
    return all(
        np.array_equal(_numbers(one[start : start + _ROWS]), _numbers(other[start : start + _ROWS]))
        for start in range(0, len(one), _ROWS)
    )


def _is_quantised(weight: Weight) -> bool:
    return isinstance(weight, StoredMatrix) and weight.is_quantised


def _numbers(weight: Weight) -> Tensor:
    return weight.floats() if isinstance(weight, StoredMatrix) else weight
