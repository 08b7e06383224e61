"""What a row's sampled drafts were drawn from."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from max.driver import Buffer

__all__ = ["DraftProbs"]


@dataclass(frozen=True)
class DraftProbs:
    """One row of a step's distributions, on the device until a step is built from the host."""

    of_step: Buffer
    """float32 `[B, K, V]`."""
    row: int
    """Which of them."""

    def read(self) -> npt.NDArray[np.float32]:
        """`[K, V]`."""
        own = self.of_step[self.row : self.row + 1, :, :]
        found: npt.NDArray[np.float32] = own.to_numpy()[0]
        return found
