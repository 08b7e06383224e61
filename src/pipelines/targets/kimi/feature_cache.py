"""Features of media items that were encoded, the last used ones, in a bounded number of bytes."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable

import numpy as np
import numpy.typing as npt

__all__ = ["FeatureCache"]


class FeatureCache:
    """Keeps arrays by name until they are too many bytes together; the least recently used go.

    The last one stays however large it is: a prompt that is read in chunks asks for its image
    again and again. An array that goes stays whole for whoever holds it.

    Args:
        max_bytes: to keep, if more than the last array is kept.

    Attributes:
        num_bytes: of all that is kept.
    """

    def __init__(self, max_bytes: int) -> None:
        self.num_bytes = 0
        self._max_bytes = max_bytes
        self._kept: OrderedDict[str, npt.NDArray[np.float32]] = OrderedDict()

    def get(
        self, name: str, make: Callable[[], npt.NDArray[np.float32]]
    ) -> npt.NDArray[np.float32]:
        """The array of this name, made if it is not kept; equal names stand for equal arrays."""
        if name not in self._kept:
            self._kept[name] = made = make()
            self.num_bytes += made.nbytes
            while self.num_bytes > self._max_bytes and len(self._kept) > 1:
                _, gone = self._kept.popitem(last=False)
                self.num_bytes -= gone.nbytes
        self._kept.move_to_end(name)
        return self._kept[name]
