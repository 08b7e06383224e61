"""Checkpoint tensors in the dtype of the graph."""

from __future__ import annotations

from collections.abc import Mapping

from max.dtype import DType
from max.graph.weights import WeightData

from .stored import as_floats
from .tensors import Tensor, Weight

__all__ = ["cast_weights"]


def cast_weights(tensors: Mapping[str, Weight], dtype: DType) -> dict[str, Tensor | WeightData]:
    """Casts float tensors to `dtype`; float32 stays where it lies in the file.

    Args:
        tensors: float16, float32 or stored matrices by name; the latter are widened first.
        dtype: float32 or bfloat16, the latter rounded by MAX.
    """
    wide = {name: as_floats(tensor) for name, tensor in tensors.items()}
    if dtype == DType.float32:
        return dict(wide)
    return {name: WeightData.from_numpy(t, name).astype(dtype) for name, t in wide.items()}
