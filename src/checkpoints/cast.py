"""Checkpoint tensors in the dtype of the graph."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from max.dtype import DType
from max.graph.weights import WeightData

from .tensors import Tensor

__all__ = ["cast_weights"]


def cast_weights(tensors: Mapping[str, Tensor], dtype: DType) -> dict[str, Tensor | WeightData]:
    """Casts float tensors to `dtype`; float32 stays where it lies in the file.

    Args:
        tensors: float16 or float32 by name.
        dtype: float32 or bfloat16, the latter rounded by MAX.
    """
    wide = {name: tensor.astype(np.float32, copy=False) for name, tensor in tensors.items()}
    if dtype == DType.float32:
        return dict(wide)
    return {name: WeightData.from_numpy(t, name).astype(dtype) for name, t in wide.items()}
