"""A branch that the compiler takes beside loops."""

from __future__ import annotations

from collections.abc import Callable

from max.dtype import DType
from max.graph import DeviceRef, TensorValue, ops

__all__ = ["replace_if"]


def replace_if(
    flag: TensorValue, value: TensorValue, replacement: Callable[[TensorValue], TensorValue]
) -> TensorValue:
    """`replacement(value)` where the flag holds, else the value; only one of them is computed.

    A loop of at most one round, because `ops.cond` does not compile around or before
    `ops.while_loop` in max 26.7.

    Args:
        flag: bool scalar on the CPU.
        value: any tensor.
        replacement: builds a tensor of the same type.
    """
    zero = ops.constant(0, DType.int64, device=DeviceRef.CPU())
    one = ops.constant(1, DType.int64, device=DeviceRef.CPU())

    def unfinished(round_: TensorValue, rounds: TensorValue, value: TensorValue) -> TensorValue:
        return round_ < rounds

    def body(round_: TensorValue, rounds: TensorValue, value: TensorValue) -> list[TensorValue]:
        return [round_ + 1, rounds, ops.rebind(replacement(value), value.shape)]

    rounds = ops.where(flag, one, zero)
    return ops.while_loop([zero, rounds, value], unfinished, body)[2]
