"""How fast this machine reads memory, which bounds how fast weights can be read."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from time import perf_counter
from typing import Final

import numpy as np

__all__ = ["reading_gb_per_s"]

_BYTES: Final = 1 << 29
"""Much more than a cache holds."""
_PASSES: Final = 8


def reading_gb_per_s(threads: int) -> float:
    """The fastest of some passes over a buffer, a part of it by each thread.

    The bitwise or of all words was the fastest of numpy's and PyTorch's reductions and products.
    """
    parts = np.array_split(np.ones(_BYTES // 8, np.uint64), threads)
    times = []
    with ThreadPoolExecutor(threads) as pool:
        for _ in range(_PASSES):
            begin = perf_counter()
            list(pool.map(np.bitwise_or.reduce, parts))
            times.append(perf_counter() - begin)
    return _BYTES / min(times) / 1e9
