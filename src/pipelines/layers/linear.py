"""Linear layers over the same input as one matrix product."""

from __future__ import annotations

from collections.abc import Sequence

from max.dtype import DType
from max.graph import DeviceRef, TensorValue, ops
from max.nn import Linear, Module

__all__ = ["GatedMLP", "fused_linear"]


def fused_linear(x: TensorValue, layers: Sequence[Linear]) -> list[TensorValue]:
    """Applies linear layers to the same input in one product.

    One product over a tall matrix is faster than several over short ones; the weights are
    joined once, when the graph is loaded.

    Args:
        x: `[T, H]`.
        layers: all of them with a bias, or none.

    Returns:
        `[T, N]` of each layer with N outputs.
    """
    weights = [TensorValue(layer.weight) for layer in layers]  # [N, H] each
    y = x @ ops.concat(weights).T
    biases = [TensorValue(layer.bias) for layer in layers if layer.bias is not None]
    if biases:
        y = y + ops.concat(biases)
    return ops.split(y, [weight.shape[0] for weight in weights], axis=-1)


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
        gate, up = fused_linear(x, [self.gate_proj, self.up_proj])
        return self.down_proj(ops.silu(gate) * up)
