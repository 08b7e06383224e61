"""A step whose launches the device has recorded, to be launched all at once."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import count
from typing import Final

from max.driver import Buffer
from max.engine import Model

__all__ = ["Captured"]

# Of device graphs, which MAX tells apart by a number.
_KEYS: Final = count(1)


class Captured:
    """One recorded step. A replay runs no code of the host, so what the host had said stays said.

    The inputs' memory is read anew in each replay, and all replays write the same outputs.

    Args:
        model: has run with these inputs before.
        buffers: the inputs, which must stay.

    Attributes:
        outputs: of the last replay.

    Raises:
        RuntimeError: the model does something that cannot be recorded.
    """

    def __init__(self, model: Model, buffers: Sequence[Buffer]) -> None:
        self._model = model
        self._buffers = tuple(buffers)
        self._key = next(_KEYS)
        self.outputs: list[Buffer] = model.capture(self._key, *self._buffers)

    def replay(self) -> list[Buffer]:
        """Enqueues the step; returns its outputs."""
        self._model.replay(self._key, *self._buffers)
        return self.outputs

    def release(self) -> None:
        """Frees what was recorded, as soon as no replay runs."""
        self.outputs = []
        self._model.release_captured_graph(self._key)
