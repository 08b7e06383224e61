"""A branch that the compiler takes beside loops."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from max.dtype import DType
from max.graph import DeviceRef, TensorValue, ops

__all__ = ["replace_if", "run_if"]


def replace_if(
    flag: TensorValue, value: TensorValue, replacement: Callable[[TensorValue], TensorValue]
) -> TensorValue:
    """`replacement(value)` where the flag holds, else the value; only one of them is computed.

    Args:
        flag: bool scalar on the CPU.
        value: any tensor.
        replacement: builds a tensor of the same type.
    """
    return run_if(flag, [value], lambda value: [replacement(value)])[0]


def run_if(
    flag: TensorValue,
    values: Sequence[TensorValue],
    body: Callable[..., Sequence[TensorValue]],
) -> list[TensorValue]:
    """`body(*values)` where the flag holds, else the values; only one of them is computed.

    A loop of at most one round, because `ops.cond` does not compile around or before
    `ops.while_loop` in max 26.7.

    Args:
        flag: bool scalar on the CPU.
        values: at least one tensor.
        body: builds as many tensors of the same types.
    """
    zero = ops.constant(0, DType.int64, device=DeviceRef.CPU())
    one = ops.constant(1, DType.int64, device=DeviceRef.CPU())

    def unfinished(round_: TensorValue, rounds: TensorValue, *_: TensorValue) -> TensorValue:
        return round_ < rounds

    def round_of(
        round_: TensorValue, rounds: TensorValue, *values: TensorValue
    ) -> list[TensorValue]:
        following = round_ + 1
        pairs = zip(body(*values), values, strict=True)
        return [following, rounds, *(ops.rebind(new, old.shape) for new, old in pairs)]

    rounds = ops.where(flag, one, zero)
    return ops.while_loop([zero, rounds, *values], unfinished, round_of)[2:]
