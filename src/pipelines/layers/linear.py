"""Linear layers and embeddings, and which kernel computes them.

On a CPU that is always one of `unispec.kernels`, whose weights may be stored in any form; elsewhere
MAX's.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from max import nn
from max.dtype import DType
from max.graph import DeviceRef, TensorValue, Weight, ops
from max.nn import Module, RMSNorm

from unispec.kernels import operations
from unispec.kernels.forms import FLOATS, Form, is_whole, stored_shape
from unispec.kernels.operations import Matrix, MLPHalf, Norm

__all__ = [
    "Embedding",
    "GatedMLP",
    "Linear",
    "Storing",
    "add_linear",
    "as_norm",
    "fused_linear",
    "normed_linear",
    "paired",
]


class Storing(Module):
    """A layer whose matrix `[rows, columns]` may be stored in any form on a CPU."""

    form: Form = "f32"
    """How the weight is stored."""
    rows: int
    """N, of the matrix."""
    columns: int
    """K, of the matrix."""
    on_cpu: bool
    """Whether our kernels compute with it."""
    weight: Weight
    """The matrix as it is stored, `stored_shape`."""
    # In a tuple, so that it is no layer within this one.
    _tied: tuple[Storing, ...] = ()

    def store_as(self, form: Form) -> None:
        """Declares the weight in that form; before it is loaded."""
        self.form = form
        dtype, shape = stored_shape(form, self.rows, self.columns)
        self.weight = Weight("weight", dtype, shape, self.weight.device)

    def tie(self, other: Storing) -> None:
        """Makes the other layer's weight this one's."""
        self._tied = (other,)
        self.tie_again()

    def tie_again(self) -> None:
        """Follows the layer that this one is tied to, if any, into another form."""
        for other in self._tied:
            self.form = other.form
            self.set_shared_weight("weight", other.weight)

    @property
    def matrix(self) -> Matrix:
        """The weight in a graph."""
        return Matrix(TensorValue(self.weight), self.form, self.rows)


class Linear(Storing, nn.Linear):
    """`max.nn.Linear` with kernels of our own on a CPU."""

    def __init__(
        self,
        in_dim: int,
        out_dim: int,
        dtype: DType,
        device: DeviceRef,
        *,
        has_bias: bool = False,
    ) -> None:
        super().__init__(in_dim, out_dim, dtype, device, has_bias=has_bias)
        self.on_cpu = device.is_cpu() and dtype == DType.float32
        self.columns, self.rows = in_dim, out_dim

    def __call__(self, x: TensorValue) -> TensorValue:
        """`[..., K]` to `[..., N]`."""
        if not self.on_cpu:
            return super().__call__(x)
        flat = x.reshape([-1, self.columns]) if x.rank != 2 else x
        y = operations.linear(flat, self.matrix)
        if self.bias is not None:
            y = y + TensorValue(self.bias)
        return y.reshape([*x.shape[:-1], self.rows]) if x.rank != 2 else y


class Embedding(Storing, nn.Embedding):
    """`max.nn.Embedding` with a kernel of our own on a CPU, where the rows are no float32."""

    def __init__(self, vocab_size: int, hidden_dim: int, dtype: DType, device: DeviceRef) -> None:
        super().__init__(vocab_size, hidden_dim, dtype, device)
        self.on_cpu = device.is_cpu() and dtype == DType.float32
        self.rows, self.columns = vocab_size, hidden_dim

    def __call__(self, indices: Any) -> TensorValue:
        """int64 `[T]` to `[T, K]`."""
        if self.form == "f32":
            return super().__call__(indices)
        return operations.embedding(TensorValue(indices), self.matrix, self.columns)


def paired(
    tokens: TensorValue,
    embedding: Embedding,
    token_norm: RMSNorm | None,
    features: TensorValue,
    feature_norm: RMSNorm | None,
) -> TensorValue:
    """A token's embedding beside a feature, each after its norm if it has one: `[T, K + H]`.

    Args:
        tokens: int64 `[T]`.
        features: `[T, H]`.
    """
    if embedding.on_cpu:
        matrix, norms = embedding.matrix, (as_norm(token_norm), as_norm(feature_norm))
        return operations.pair(tokens, matrix, embedding.columns, norms[0], features, norms[1])
    embedded = ops.rebind(embedding(tokens), [features.shape[0], embedding.columns])
    halves = [
        values if norm is None else norm(values)
        for values, norm in ((embedded, token_norm), (features, feature_norm))
    ]
    return ops.concat(halves, axis=-1)


def as_norm(norm: RMSNorm | None) -> Norm | None:
    """As our kernels take it."""
    return None if norm is None else Norm(TensorValue(norm.weight), norm.eps)


def fused_linear(x: TensorValue, layers: Sequence[Linear]) -> list[TensorValue]:
    """Applies linear layers to the same input, in one product where their weights can be joined.

    One product over a tall matrix is faster than several over short ones; the weights are
    joined once, when the graph is loaded.

    Args:
        x: `[T, H]`.
        layers: all of them with a bias, or none.

    Returns:
        `[T, N]` of each layer with N outputs.
    """
    if layers[0].on_cpu and not _can_concat(layers):
        return [layer(x) for layer in layers]
    return ops.split(_joined(x, layers), [layer.rows for layer in layers], axis=-1)


def normed_linear(x: TensorValue, norm: RMSNorm | None, layers: Sequence[Linear]) -> TensorValue:
    """Applies linear layers to the normed input, `[T, sum of N]`.

    Args:
        x: `[T, H]`.
        norm: before the layers; None: none.
    """
    matrices = [layer.matrix for layer in layers] if layers[0].on_cpu else []
    if norm is not None and operations.can_join(matrices):
        gamma = TensorValue(norm.weight)
        return _biased(operations.normed_linear(x, gamma, norm.eps, matrices), layers)
    normed = x if norm is None else norm(x)
    if layers[0].on_cpu and not _can_concat(layers):
        return ops.concat([layer(normed) for layer in layers], axis=-1)
    return _joined(normed, layers)


def add_linear(
    residual: TensorValue, x: TensorValue, layer: Linear, factor: float = 1.0
) -> TensorValue:
    """`residual + factor * layer(x)`, all `[T, N]`."""
    if layer.on_cpu and layer.bias is None:
        return operations.linear_add(residual, x, layer.matrix, factor)
    y = ops.rebind(layer(x), residual.shape)
    return residual + (y if factor == 1 else y * factor)


class GatedMLP(Module):
    """down(silu(gate(x)) * up(x)), Llama's MLP."""

    def __init__(
        self, hidden_size: int, intermediate_size: int, dtype: DType, device: DeviceRef
    ) -> None:
        super().__init__()
        self.gate_proj = Linear(hidden_size, intermediate_size, dtype, device)
        self.up_proj = Linear(hidden_size, intermediate_size, dtype, device)
        self.down_proj = Linear(intermediate_size, hidden_size, dtype, device)

    def __call__(self, x: TensorValue) -> TensorValue:
        """`[T, H]` to `[T, H]`."""
        return self.down_proj(self._gated(x))

    def added(self, x: TensorValue, norm: RMSNorm, factor: float = 1.0) -> TensorValue:
        """`x + factor * mlp(norm(x))`, `[T, H]`."""
        half = self.half(norm, factor)
        if half is not None:
            return operations.mlp(x, half)
        return add_linear(x, self._gated(norm(x)), self.down_proj, factor)

    def half(self, norm: RMSNorm, factor: float) -> MLPHalf | None:
        """What `added` computes, if one operation does."""
        gate, up, down = self.gate_proj, self.up_proj, self.down_proj
        if not gate.on_cpu or gate.form != up.form:
            return None
        matrices = (gate.matrix, up.matrix, down.matrix)
        return MLPHalf(TensorValue(norm.weight), norm.eps, *matrices, factor)

    def _gated(self, x: TensorValue) -> TensorValue:
        gate, up = fused_linear(x, [self.gate_proj, self.up_proj])
        inner: TensorValue = ops.silu(gate) * up
        return inner


def _joined(x: TensorValue, layers: Sequence[Linear]) -> TensorValue:
    """One product with the rows of all weights."""
    joined = ops.concat([TensorValue(layer.weight) for layer in layers])
    if layers[0].on_cpu:
        matrix = Matrix(joined, layers[0].form, sum(layer.rows for layer in layers))
        return _biased(operations.linear(x, matrix), layers)
    return _biased(x @ joined.T, layers)


def _biased(y: TensorValue, layers: Sequence[Linear]) -> TensorValue:
    biases = [TensorValue(layer.bias) for layer in layers if layer.bias is not None]
    return y + ops.concat(biases) if biases else y


def _can_concat(layers: Sequence[Linear]) -> bool:
    """Whether stored rows of one can stand behind those of another."""
    forms = {layer.form for layer in layers}
    if len(forms) > 1:
        return False
    return bool(forms & FLOATS.keys()) or all(is_whole(layer.rows) for layer in layers[:-1])
