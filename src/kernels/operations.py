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
from max.nn.kv_cache import PagedCacheValues

from unispec.kernels.forms import Form, is_whole

__all__ = [
    "Attending",
    "Matrix",
    "attention",
    "attention_block",
    "can_join",
    "embedding",
    "linear",
    "linear_add",
    "mlp",
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


def mlp(
    x: TensorValue,
    gamma: TensorValue,
    eps: float,
    gate: Matrix,
    up: Matrix,
    down: Matrix,
    factor: float,
) -> TensorValue:
    """X + factor * down(silu(gate(z)) * up(z)) for z = RMSNorm(x), `[T, K]`.

    Args:
        x: `[T, K]`.
        gamma: `[K]`, the norm's weight.
        up: in the same form as `gate`.
    """
    return _call(
        "unispec_mlp",
        [x, gamma, gate.stored, up.stored, down.stored],
        x.shape,
        form=gate.form,
        form_down=down.form,
        inner=gate.rows,
        eps=_bits(eps),
        factor=_bits(factor),
    )


def embedding(ids: TensorValue, matrix: Matrix, columns: int) -> TensorValue:
    """Rows of a matrix by their numbers, float32 `[T, K]`, of int64 `[T]`."""
    return _call(
        "unispec_embedding", [ids, matrix.stored], [ids.shape[0], columns], form=matrix.form
    )


class Attending(NamedTuple):
    """What attention reads beside queries, keys and values."""

    row_offsets: TensorValue
    """uint32 `[B + 1]`."""
    freqs_cis: TensorValue
    """`[positions, D]`, cosine and sine of each pair in turn."""
    cache: PagedCacheValues
    """With D a multiple of 16 and the page size one of 64."""
    layer: TensorValue
    """uint32 scalar."""
    heads: int
    """Query heads."""
    key_heads: int
    """Key and value heads."""
    head_dim: int
    """D."""
    scale: float
    """Of the scores."""
    interleaved: bool
    """Whether the two numbers that rotate together are neighbours."""

    @property
    def values(self) -> list[TensorValue | BufferValue]:
        """The operands."""
        cache = self.cache
        return [
            self.row_offsets,
            self.freqs_cis,
            cache.kv_blocks,
            cache.page_stride,
            cache.cache_lengths,
            cache.lookup_table,
            self.layer.reshape([1]),
        ]

    @property
    def parameters(self) -> dict[str, int | str]:
        """Those of the operation."""
        return {
            "heads": self.heads,
            "key_heads": self.key_heads,
            "head_dim": self.head_dim,
            "scale": _bits(self.scale),
            "interleaved": int(self.interleaved),
        }


def attention(qkv: TensorValue, attending: Attending) -> TensorValue:
    """Rotates queries and keys, stores keys and values, and attends causally, `[T, heads * D]`.

    Args:
        qkv: `[T, (heads + 2 * key_heads) * D]`.
    """
    out = TensorType(
        DType.float32, [qkv.shape[0], attending.heads * attending.head_dim], DeviceRef.CPU()
    )
    return ops.inplace_custom(
        "unispec_attention",
        DeviceRef.CPU(),
        [qkv, *attending.values],
        [out],
        parameters=attending.parameters,
    )[0].tensor


def attention_block(
    x: TensorValue,
    residual: TensorValue,
    norm: tuple[TensorValue, float] | None,
    projections: Sequence[Matrix],
    output: Matrix,
    attending: Attending,
    factor: float,
) -> TensorValue:
    """Residual + factor * output(attention(RMSNorm(x))), `[T, N]`; see `attention`.

    Args:
        x: `[T, K]`.
        norm: its weight `[K]` and eps; None: x is taken as it is.
        projections: of queries, keys and values; see `can_join`.
    """
    gamma, eps = norm or (ops.constant(0.0, DType.float32, DeviceRef.CPU()).reshape([1]), 0.0)
    stored = [matrix.stored for matrix in (*projections, output)]
    forms: dict[str, Any] = {f"form{at}": one.form for at, one in enumerate(projections)}
    return ops.inplace_custom(
        "unispec_attention_block",
        DeviceRef.CPU(),
        [x, residual, gamma, *stored, *attending.values],
        [TensorType(DType.float32, [x.shape[0], output.rows], DeviceRef.CPU())],
        parameters={
            **forms,
            "form_out": output.form,
            "normed": int(norm is not None),
            "eps": _bits(eps),
            "factor": _bits(factor),
            **attending.parameters,
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
