"""Counter-based random numbers: a draw depends on (request seed, position), never on the batch."""

from __future__ import annotations

from enum import IntEnum

from max.dtype import DType
from max.graph import DeviceRef, TensorValue, ops
from max.nn.kernels import keyed_uniform

__all__ = ["Stream", "positions", "uniform"]

# SplitMix64's increment (Steele, Lea, Flood 2014): neighbouring positions get far-apart keys.
_GOLDEN_GAMMA = 0x9E3779B97F4A7C15
# Added to a key for the lower half of its number: digits of pi, as those of `Stream`.
_LOWER_HALF = 0xA4093822299F31D0
_HALF = 2.0**24  # a float32 in [0, 1) has so many steps


class Stream(IntEnum):
    """Independent families of draws at the same (seed, position)."""

    TOKEN = 0x243F6A8885A308D3
    """The token that the target draws at a position."""
    ACCEPT = 0x13198A2E03707344
    """Whether a draft stands (`Rejection`, `Synthetic`)."""
    DRAFT = 0x24299F31D0082EFA
    """The token that a sampled draft proposes."""


def positions(first: TensorValue, like: TensorValue) -> TensorValue:
    """Absolute positions of the tokens that a row decides in one step.

    Args:
        first: int64 `[B]`, position of the first token to be decided.
        like: any `[B, J, ...]` tensor; only its dimensions are read.

    Returns:
        int64 `[B, J]`, `first[b] + j`.
    """
    count = like.shape[1]
    steps = ops.range(0, count, 1, out_dim=count, dtype=DType.int64, device=first.device)  # [J]
    return ops.unsqueeze(first, 1) + ops.unsqueeze(steps, 0)  # [B, J]


def uniform(seed: TensorValue, position: TensorValue, stream: Stream) -> TensorValue:
    """Draws one uniform number for each (row, position).

    Args:
        seed: uint64 `[B]`, the request's seed.
        position: int64 `[B, J]`, absolute position of the token that the draw decides.

    Returns:
        float64 `[B, J]` in `[0, 1)`, in steps of 2**-48. Philox keyed by seed and position.
    """
    gamma = _uint64(_GOLDEN_GAMMA, seed.device)
    offset = _uint64(stream.value, seed.device)
    key = ops.unsqueeze(seed, 1) + offset + (position + 1).cast(DType.uint64) * gamma  # [B, J]
    upper = ops.floor(keyed_uniform(key) * _HALF).cast(DType.float64)
    lower = ops.floor(keyed_uniform(key + _uint64(_LOWER_HALF, seed.device)) * _HALF)
    number: TensorValue = (upper + lower.cast(DType.float64) / _HALF) / _HALF
    return number


def _uint64(value: int, device: DeviceRef) -> TensorValue:
    return ops.constant(value, DType.uint64, device=device)
