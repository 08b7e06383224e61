"""The random numbers of a request, from Philox 4x32 with 10 rounds (Salmon et al. 2011) in numpy.

Reproducible answers rest on them: a seed and a position have the same number in every version.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

__all__ = ["numbers", "philox"]

_MULTIPLIERS = (np.uint64(0xD2511F53), np.uint64(0xCD9E8D57))
_WEYL = (np.uint64(0x9E3779B9), np.uint64(0xBB67AE85))
_WORD = np.uint64(0xFFFFFFFF)
_HIGH = np.uint64(32)

_GOLDEN_GAMMA = 0x9E3779B97F4A7C15  # 2**64 over the golden ratio, odd
_PI = 0xA4093822299F31D0  # digits of pi
_SCALE = np.float32(4.6566127342e-10)  # one float32 below 2**-31: no product reaches 1


def philox(
    keys: npt.NDArray[np.uint64], counter: tuple[int, int, int, int] = (0, 0, 0, 0)
) -> npt.NDArray[np.uint64]:
    """The four words of 32 bits [..., 4] of each key [...]."""
    c0, c1, c2, c3 = (np.full(keys.shape, word, np.uint64) for word in counter)
    k0, k1 = keys & _WORD, keys >> _HIGH
    for _ in range(10):
        p0, p1 = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0, c1, c2, c3 = (p1 >> _HIGH) ^ c1 ^ k0, p1 & _WORD, (p0 >> _HIGH) ^ c3 ^ k1, p0 & _WORD
        k0, k1 = (k0 + _WEYL[0]) & _WORD, (k1 + _WEYL[1]) & _WORD
    return np.stack([c0, c1, c2, c3], axis=-1)


def numbers(seed: int, positions: npt.ArrayLike, purpose: int) -> npt.NDArray[np.float64]:
    """The numbers in [0, 1) of a seed at positions [...] for a purpose, in steps of 2**-48.

    Two keys, one for each 24 bits, which are those of the first word's lower 31 bits as a
    float32 in [0, 1).
    """
    key = (seed + purpose + _GOLDEN_GAMMA) % 2**64
    keys = np.uint64(key) + np.asarray(positions, np.uint64) * np.uint64(_GOLDEN_GAMMA)
    upper, lower = (
        (philox(half)[..., 0] & np.uint64(2**31 - 1)).astype(np.float32) * _SCALE
        for half in (keys, keys + np.uint64(_PI))
    )
    digits = np.floor(np.stack([upper, lower]).astype(np.float64) * 2**24)
    return np.asarray(digits[0] / 2**24 + digits[1] / 2**48)
