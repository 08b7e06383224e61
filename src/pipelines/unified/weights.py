"""Weights in the number format that a module declares."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from max.driver import Buffer
from max.dtype import DType
from max.graph import Shape
from max.graph.weights import WeightData
from max.nn import Module

from unispec.checkpoints import Tensor
from unispec.checkpoints.cast import cast_weights

__all__ = ["load_weights"]

_FLOAT8 = DType.float8_e4m3fn


def load_weights(module: Module, state: Mapping[str, Tensor]) -> None:
    """Loads weights into a module, each cast to the dtype that it declares.

    Args:
        module: where the names of `state` are weights.
        state: float16, float32 or int64, or uint8 that holds float8 e4m3.

    Raises:
        ValueError: a name is no weight of the module.
    """
    declared = module.raw_state_dict()
    if unknown := sorted(state.keys() - declared.keys()):
        raise ValueError(f"the module declares no weights {', '.join(unknown)}")
    cast: dict[str, Tensor | WeightData] = {}
    for name, tensor in state.items():
        dtype = declared[name].dtype
        if dtype == _FLOAT8:
            cast[name] = _as_float8(tensor, name)
        elif dtype.is_integral():
            cast[name] = tensor
        else:
            cast |= cast_weights({name: tensor}, dtype)
    # The files need not align them.
    module.load_state_dict(cast, weight_alignment=1)


def _as_float8(tensor: Tensor, name: str) -> WeightData:
    data = Buffer.from_numpy(np.ascontiguousarray(tensor)).view(_FLOAT8, tensor.shape)
    return WeightData(data, name, _FLOAT8, Shape(tensor.shape))
