"""A draft's copies of its target's embedding and head, held against this target's own."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Final

import numpy as np
import numpy.typing as npt

from unispec.checkpoints import Weight
from unispec.checkpoints.stored import as_floats
from unispec.checkpoints.tied_head import EMBEDDING, HEAD
from unispec.checkpoints.validation import canonical_names
from unispec.errors import InputError

__all__ = ["check_copies"]

_LOGGER: Final = logging.getLogger(__name__)

_COMPARED: Final = 64
"""Rows that are looked at, spread over the tokens that both have."""

_MIN_COSINE: Final = 0.9
"""Least cosine of two rows that a fine-tune or a coarse number format may have moved apart."""

_SAME_COSINE: Final = 0.99
"""Least cosine of two rows that are one."""

_CHUNK: Final = 8192
"""Rows of the target that are looked through at a time."""


def check_copies(
    tensors: Mapping[str, Weight],
    target: Mapping[str, Weight],
    *,
    names: Sequence[str] = (EMBEDDING, HEAD),
    source: str,
) -> None:
    """Refuses a draft whose tokens are others than the target's, as far as its copies tell.

    Rows that are only unlike the target's get a warning: answers stay right, but such a draft
    was trained for another model. A target in blocks is off by what they round, which is far
    less than what counts as unlike.

    Args:
        names: canonical names of what may be a copy.

    Raises:
        InputError: the row of a token is in the target that of another one.
    """
    found = canonical_names(tensors, source=source)
    for name in names:
        own = target.get(name, target[EMBEDDING])
        # With d2t the head's rows are those of a few tokens.
        if name not in found or (name == HEAD and "d2t" in found):
            continue
        copy = tensors[found[name]]
        if copy.ndim != 2 or copy.shape[1] != own.shape[1]:
            continue
        tokens = np.unique(np.linspace(0, min(len(copy), len(own)) - 1, _COMPARED).astype(int))
        rows = _unit(copy[tokens])  # [R, H]
        similar = (rows * _unit(own[tokens])).sum(axis=1) >= _MIN_COSINE  # [R]
        if 2 * similar.sum() >= len(tokens):
            continue
        nearest, cosine = _nearest(rows, own)
        moved = np.flatnonzero(~similar & (cosine >= _SAME_COSINE))
        if 2 * len(moved) >= len(tokens):
            first = moved[0]
            raise InputError(
                f"{source}: token {tokens[first]} of {found[name]!r} is token {nearest[first]} of"
                " the target: use a draft that was trained for this target's tokenizer"
            )
        _LOGGER.warning(
            "%s: %r is not the target's, so the draft was trained for another model; expect few of"
            " its tokens to be accepted",
            source,
            found[name],
        )


def _unit(rows: Weight) -> npt.NDArray[np.float32]:
    """Rows `[R, H]` of length 1; those of zeros stay."""
    floats = as_floats(rows)
    length = np.linalg.norm(floats, axis=1, keepdims=True)
    length[length == 0] = 1
    unit: npt.NDArray[np.float32] = floats / length
    return unit


def _nearest(
    rows: npt.NDArray[np.float32], table: Weight
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float32]]:
    """For unit rows `[R, H]` the index of the row in `[V, H]` of the largest cosine, and that."""
    index = np.zeros(len(rows), np.int64)
    cosine: npt.NDArray[np.float32] = np.full(len(rows), -1, np.float32)
    for start in range(0, len(table), _CHUNK):
        found: npt.NDArray[np.float32] = rows @ _unit(table[start : start + _CHUNK]).T
        best, value = found.argmax(axis=1), found.max(axis=1)  # [R] each
        closer = value > cosine
        index[closer] = start + best[closer]
        cosine[closer] = value[closer]
    return index, cosine
