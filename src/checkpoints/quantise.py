"""Weights in another number format: that of a GGUF type, or float32."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Final

import gguf
import numpy as np
import numpy.typing as npt
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

from unispec.checkpoints.halves import half_bytes
from unispec.checkpoints.q4_k import to_q4_k
from unispec.checkpoints.q6_k import to_q6_k
from unispec.checkpoints.stored import StoredMatrix, as_floats
from unispec.checkpoints.tensors import Weight
from unispec.encodings import BFLOAT16, DRAFT_ENCODINGS, FLOAT32
from unispec.errors import InputError

__all__ = ["encode_state", "quantise"]

_BF16: Final = GGMLQuantizationType.BF16
_Q8_0: Final = GGMLQuantizationType.Q8_0
_Q4_0: Final = GGMLQuantizationType.Q4_0
_Q4_K: Final = GGMLQuantizationType.Q4_K
_Q6_K: Final = GGMLQuantizationType.Q6_K

_KINDS: Final[Mapping[str, tuple[GGMLQuantizationType, ...]]] = {
    BFLOAT16: (_BF16,),
    "q8_0": (_Q8_0,),
    "q4_0": (_Q4_0,),
    "q4_k": (_Q4_K, _Q8_0),
    "q6_k": (_Q6_K, _Q8_0),
}
"""The format of each encoding, and the one of rows that are no whole blocks of the first."""

_OF_TABLES: Final = {"q4_0": "q8_0", "q4_k": "q6_k"}
"""The encoding of embedding and head, where it is another; llama.cpp's files have it so."""

_TABLES: Final = ("embed_tokens.weight", "lm_head.weight")
_MATRICES: Final = ("_proj.weight", "fc.weight", *_TABLES)

_TO_BYTES: Final[
    Mapping[GGMLQuantizationType, Callable[[npt.NDArray[np.float32]], npt.NDArray[np.uint8]]]
] = {
    _BF16: partial(half_bytes, kind=_BF16),
    _Q8_0: partial(gguf.quantize, qtype=_Q8_0),
    _Q4_0: partial(gguf.quantize, qtype=_Q4_0),
    _Q4_K: to_q4_k,
    _Q6_K: to_q6_k,
}

# A few arrays of so many numbers stay in a processor's cache.
_CHUNK: Final = 1 << 17


def quantise(weight: Weight, encoding: str, label: str) -> Weight:
    """Rounds a matrix `[N, K]`, unless it has the format already or its rows do not fit.

    Q4_K and Q6_K need K to be a multiple of 256, Q8_0 and Q4_0 one of 32. Where it is one of 32
    alone, Q8_0 takes the place of Q4_K and Q6_K.

    Args:
        weight: of floating point.
        encoding: one of `DRAFT_ENCODINGS` but float32.
        label: what to call the weight in errors.

    Raises:
        InputError: a number is NaN or too large for the encoding.
    """
    rows, columns = weight.shape
    kinds = [kind for kind in _KINDS[encoding] if columns % GGML_QUANT_SIZES[kind][0] == 0]
    if not kinds or (isinstance(weight, StoredMatrix) and weight.kind is kinds[0]):
        return weight
    kind = kinds[0]
    block, block_bytes = GGML_QUANT_SIZES[kind]
    stored = np.empty((rows, columns // block * block_bytes), np.uint8)
    step = max(1, _CHUNK // columns)
    largest = np.float32(0)
    with np.errstate(invalid="ignore", over="ignore"):
        for start in range(0, rows, step):
            part = np.ascontiguousarray(as_floats(weight[start : start + step]))
            largest = np.maximum(largest, np.abs(part).max())
            stored[start : start + step] = _TO_BYTES[kind](part)
    made = StoredMatrix(kind, (rows, columns), stored)
    if not np.isfinite(largest) or made.bad_numbers():
        limit = f"the float16 scales of {encoding}" if made.is_quantised else encoding
        raise InputError(
            f"{label} has numbers as far from 0 as {largest:g}, which is beyond {limit}: use"
            f" {FLOAT32}, or download the checkpoint again"
        )
    return made


def encode_state(
    state: Mapping[str, Weight], encoding: str | None, source: str
) -> dict[str, Weight]:
    """Brings the projections, the embedding and the head of a model into a number format.

    With one of blocks, what is quantised already stays as it is. Embedding and head are Q8_0 with
    q4_0, and Q6_K with q4_k. With float32 all other stored matrices are widened as well.

    Args:
        state: weights by name.
        encoding: one of `DRAFT_ENCODINGS`; None: all weights stay as they are.

    Raises:
        InputError: there is no such encoding, a number is NaN or too large for it, or all that
            could be in it is quantised to other formats.
    """
    if encoding is None:
        return dict(state)
    if encoding not in DRAFT_ENCODINGS:
        known = ", ".join(DRAFT_ENCODINGS)
        raise InputError(f"{source}: weights cannot be stored as {encoding!r}: use one of {known}")
    if encoding == FLOAT32:
        return {
            name: as_floats(weight) if isinstance(weight, StoredMatrix) else weight
            for name, weight in state.items()
        }
    encoded = dict(state)
    for name, weight in state.items():
        if _is_matrix(name, weight) and (encoding == BFLOAT16 or not _is_quantised(weight)):
            chosen = _OF_TABLES.get(encoding, encoding) if name.endswith(_TABLES) else encoding
            encoded[name] = quantise(weight, chosen, f"{source}: tensor {name!r}")
    _check_encoded(state, encoded, encoding, source)
    return encoded


def _check_encoded(
    state: Mapping[str, Weight], encoded: Mapping[str, Weight], encoding: str, source: str
) -> None:
    """Refuses an encoding that no projection of a quantised model has."""
    stayed = {
        weight.kind.name
        for name, weight in state.items()
        if isinstance(weight, StoredMatrix) and encoded[name] is weight and weight.is_quantised
    }
    # A projection that was quantised has the encoding, whatever its rows fit into.
    reached = any(
        isinstance(weight, StoredMatrix)
        and not name.endswith(_TABLES)
        and (weight.kind is _KINDS[encoding][0] or weight is not state[name])
        for name, weight in encoded.items()
    )
    if stayed and not reached:
        raise InputError(
            f"{source} is quantised already, to {' and '.join(sorted(stayed))}, and cannot be"
            f" brought into {encoding}: leave quantization_encoding out, or give the model's float"
            " checkpoint"
        )


def _is_matrix(name: str, weight: Weight) -> bool:
    return name.endswith(_MATRICES) and weight.ndim == 2 and weight.dtype.kind == "f"


def _is_quantised(weight: Weight) -> bool:
    return isinstance(weight, StoredMatrix) and weight.is_quantised
