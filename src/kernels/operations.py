"""Our operations for a CPU, as functions of graph values; see `mojo/` for what computes them.

Activations are float32, weights in any form. All sums of a row of x are the same to the last bit
whatever other rows are computed with it.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import Any, NamedTuple

from max.dtype import DType
from max.graph import BufferValue, DeviceRef, Dim, TensorType, TensorValue, ops

from unispec.kernels.forms import Form, is_whole

__all__ = [
    "Matrix",
    "attention",
    "can_join",
    "embedding",
    "linear",
    "linear_add",
    "normed_gated",
    "normed_linear",
]


class Matrix(NamedTuple):
    """A weight matrix `[N, K]`."""

    stored: TensorValue
    """Its array, as `stored_shape` has it."""
    form: Form
    """How it is stored."""
    rows: int
    """N."""


def linear(x: TensorValue, matrix: Matrix) -> TensorValue:
    """The product with the transposed matrix, float32 `[T, N]`, of `[T, K]`."""
    return _call("unispec_linear", [x, matrix.stored], [x.shape[0], matrix.rows], form=matrix.form)


def linear_add(residual: TensorValue, x: TensorValue, matrix: Matrix, factor: float) -> TensorValue:
    """The residual `[T, N]` plus `factor` times the product of `linear`."""
    return _call(
        "unispec_linear_add",
        [x, matrix.stored, residual],
        [x.shape[0], matrix.rows],
        form=matrix.form,
        factor=_bits(factor),
    )


def can_join(matrices: Sequence[Matrix]) -> bool:
    """Whether `normed_linear` takes them: three, and whole tiles but for the last one."""
    return len(matrices) == 3 and all(is_whole(matrix.rows) for matrix in matrices[:-1])


def normed_linear(
    x: TensorValue, gamma: TensorValue, eps: float, matrices: Sequence[Matrix]
) -> TensorValue:
    """The products of RMSNorm(x) with three matrices side by side, `[T, sum of N]`.

    Args:
        x: `[T, K]`.
        gamma: `[K]`, the norm's weight.
        matrices: see `can_join`.
    """
    return _call(
        "unispec_normed_linear",
        [x, gamma, *(matrix.stored for matrix in matrices)],
        [x.shape[0], sum(matrix.rows for matrix in matrices)],
        eps=_bits(eps),
        **{f"form{index}": matrix.form for index, matrix in enumerate(matrices)},
    )


def normed_gated(
    x: TensorValue, gamma: TensorValue, eps: float, gate: Matrix, up: Matrix
) -> TensorValue:
    """silu(gate(z)) * up(z) for z = RMSNorm(x), `[T, N]`; both matrices in one form."""
    return _call(
        "unispec_normed_gated",
        [x, gamma, gate.stored, up.stored],
        [x.shape[0], gate.rows],
        form=gate.form,
        eps=_bits(eps),
    )


def embedding(ids: TensorValue, matrix: Matrix, columns: int) -> TensorValue:
    """Rows of a matrix by their numbers, float32 `[T, K]`, of int64 `[T]`."""
    return _call(
        "unispec_embedding", [ids, matrix.stored], [ids.shape[0], columns], form=matrix.form
    )


def attention(
    qkv: TensorValue,
    row_offsets: TensorValue,
    freqs_cis: TensorValue,
    blocks: BufferValue,
    page_stride: TensorValue,
    lengths: TensorValue,
    table: TensorValue,
    layer: TensorValue,
    *,
    heads: int,
    key_heads: int,
    head_dim: int,
    scale: float,
    interleaved: bool,
) -> TensorValue:
    """Rotates queries and keys, stores keys and values, and attends causally, `[T, heads * D]`.

    Args:
        qkv: `[T, (heads + 2 * key_heads) * D]`.
        row_offsets: uint32 `[B + 1]`.
        freqs_cis: `[positions, D]`, cosine and sine of each pair in turn.
        blocks: `[pages, 2, layers, page size, key heads, D]`; D a multiple of 16, the page size
            one of 64.
        page_stride: int64 `[1]`, how far pages are apart, in numbers.
        lengths: uint32 `[B]`, tokens of each row before this step.
        table: uint32 `[B, pages of a row]`.
        layer: uint32 scalar.
        interleaved: whether the two numbers that rotate together are neighbours.
    """
    return ops.inplace_custom(
        "unispec_attention",
        DeviceRef.CPU(),
        [
            qkv,
            row_offsets,
            freqs_cis,
            blocks,
            page_stride,
            lengths,
            table,
            layer.reshape([1]),
        ],
        [TensorType(DType.float32, [qkv.shape[0], heads * head_dim], DeviceRef.CPU())],
        parameters={
            "heads": heads,
            "key_heads": key_heads,
            "head_dim": head_dim,
            "scale_bits": _bits(scale),
            "interleaved": int(interleaved),
        },
    )[0].tensor


def _call(
    name: str, values: Sequence[TensorValue], shape: Sequence[int | Dim], **parameters: Any
) -> TensorValue:
    out = TensorType(DType.float32, shape, DeviceRef.CPU())
    return ops.custom(name, DeviceRef.CPU(), values, [out], parameters)[0].tensor


def _bits(number: float) -> int:
    """A float32 as an integer: an operation's parameters are no floats in max 26.7."""
    bits: int = struct.unpack("<i", struct.pack("<f", number))[0]
    return bits
