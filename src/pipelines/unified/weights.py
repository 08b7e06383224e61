"""Weights in the number format that a module declares."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np
from max.driver import Buffer
from max.dtype import DType
from max.graph import Shape
from max.graph.weights import WeightData
from max.nn import Module

from unispec.checkpoints import StoredMatrix, Tensor, Weight
from unispec.checkpoints.cast import cast_weights
from unispec.checkpoints.mapped import forget_pages
from unispec.kernels.forms import FLOATS, form_of
from unispec.kernels.packed_files import packed, remove_unused
from unispec.pipelines.layers.linear import Storing

__all__ = ["load_weights"]

_FLOAT8 = DType.float8_e4m3fn


def load_weights(module: Module, state: Mapping[str, Weight]) -> None:
    """Loads weights into a module, each cast to the dtype that it declares.

    Args:
        module: where the names of `state` are weights.
        state: float16, float32 or int64, uint8 that holds float8 e4m3, or matrices as they are
            stored, which our layers keep so on a CPU; elsewhere they are widened.

    Raises:
        ValueError: a name is no weight of the module.
    """
    _store_as_found(module, state)
    declared = module.raw_state_dict()
    if unknown := sorted(state.keys() - declared.keys()):
        raise ValueError(f"the module declares no weights {', '.join(unknown)}")
    cast: dict[str, Tensor | WeightData] = {}
    for name, tensor in state.items():
        dtype = declared[name].dtype
        if isinstance(tensor, StoredMatrix) and FLOATS.get(form_of(tensor.kind)) == dtype:
            cast[name] = _as_halves(tensor, name)
        elif not dtype.is_integral() and dtype != _FLOAT8:
            cast |= cast_weights({name: tensor}, dtype)
        elif isinstance(tensor, StoredMatrix):
            cast[name] = packed(tensor)
        elif dtype == _FLOAT8:
            cast[name] = _as_float8(tensor, name)
        else:
            cast[name] = tensor
    # The files need not align them.
    module.load_state_dict(cast, weight_alignment=1)
    remove_unused()
    # Checks have read all of them; what was packed or widened is not read again.
    forget_pages(state.values())


def _store_as_found(module: Module, state: Mapping[str, Weight]) -> None:
    """Lets each layer that can keep the form in which its matrix is."""
    layers = [(name, layer) for name, layer in _layers(module) if isinstance(layer, Storing)]
    for name, layer in layers:
        weight = state.get(f"{name}.weight")
        if isinstance(weight, StoredMatrix) and layer.on_cpu:
            layer.store_as(form_of(weight.kind))
    for _, layer in layers:
        layer.tie_again()


def _layers(module: Module, name: str = "") -> Iterator[tuple[str, Module]]:
    """All layers and what the names of their weights begin with."""
    yield name, module
    for own, layer in module.sublayers.items():
        yield from _layers(layer, f"{name}.{own}" if name else own)


def _as_halves(tensor: StoredMatrix, name: str) -> WeightData:
    """A matrix of float16 or bfloat16 where it lies."""
    dtype = FLOATS[form_of(tensor.kind)]
    data = Buffer.from_numpy(np.ascontiguousarray(tensor.blocks)).view(dtype, tensor.shape)
    return WeightData(data, name, dtype, Shape(tensor.shape))


def _as_float8(tensor: Tensor, name: str) -> WeightData:
    data = Buffer.from_numpy(np.ascontiguousarray(tensor)).view(_FLOAT8, tensor.shape)
    return WeightData(data, name, _FLOAT8, Shape(tensor.shape))
