"""The random numbers and the draw by themselves, in one small compiled graph."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from max.driver import CPU, Buffer
from max.dtype import DType
from max.engine import InferenceSession
from max.graph import DeviceRef, Graph, TensorType, ops

from unispec.sampling.distribution import draw
from unispec.sampling.seeds import Stream, uniform

__all__ = ["RandomGraph"]

FloatArray = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.int64]


def build_graph() -> Graph:
    """Builds the graph for any rows, positions, points and vocabulary; nothing is compiled."""
    cpu = DeviceRef.CPU()
    types = [
        TensorType(DType.uint64, ["batch"], cpu),
        TensorType(DType.int64, ["batch", "num_positions"], cpu),
        TensorType(DType.float32, ["any_vocab"], cpu),
        TensorType(DType.float64, [1, "num_points"], cpu),
    ]
    with Graph("random_numbers", input_types=types) as graph:
        seed, position, weights, points = (value.tensor for value in graph.inputs)
        shape = [1, points.shape[1], weights.shape[0]]
        graph.output(
            *(uniform(seed, position, stream) for stream in Stream),
            draw(ops.broadcast_to(weights, shape), points),
        )
    return graph


class RandomGraph:
    """The compiled graph."""

    def __init__(self) -> None:
        self._model = InferenceSession(devices=[CPU()]).load(build_graph())

    def uniforms(self, seeds: npt.ArrayLike, positions: npt.ArrayLike) -> dict[Stream, FloatArray]:
        """The numbers [B, J] of each stream.

        Args:
            seeds: [B].
            positions: [B, J], or anything that broadcasts to it.
        """
        keys = np.asarray(seeds, np.uint64)
        where = np.atleast_2d(np.asarray(positions, np.int64))
        where = np.broadcast_to(where, (len(keys), where.shape[1]))
        *numbers, _ = self._execute(keys, where, np.ones(1, np.float32), np.zeros((1, 1)))
        return dict(zip(Stream, numbers, strict=True))

    def draw(self, weights: npt.NDArray[np.float32], points: npt.ArrayLike) -> IntArray:
        """The tokens [N] at points [N] in [0, 1) of the distribution [V], 64 points at a time."""
        chunks = np.array_split(np.asarray(points, np.float64), -(-np.size(points) // 64))
        none = np.zeros((1, 1), np.int64)
        drawn = [
            self._execute(np.zeros(1, np.uint64), none, weights, chunk[np.newaxis])[-1][0]
            for chunk in chunks
        ]
        return np.concatenate(drawn)

    def _execute(self, *values: npt.NDArray[np.generic]) -> list[npt.NDArray[np.generic]]:
        outputs = self._model.execute(
            *(Buffer.from_numpy(np.ascontiguousarray(value)) for value in values)
        )
        return [output.to_numpy() for output in outputs]
