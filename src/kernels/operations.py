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
    "AttentionHalf",
    "MLPHalf",
    "Matrix",
    "Norm",
    "attention",
    "attention_block",
    "can_join",
    "decoder_layer",
    "embedding",
    "linear",
    "linear_add",
    "mlp",
    "normed_linear",
    "pair",
    "store",
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


def embedding(ids: TensorValue, matrix: Matrix, columns: int) -> TensorValue:
    """Rows of a matrix by their numbers, float32 `[T, K]`, of int64 `[T]`."""
    return _call(
        "unispec_embedding", [ids, matrix.stored], [ids.shape[0], columns], form=matrix.form
    )


class Norm(NamedTuple):
    """An RMSNorm."""

    weight: TensorValue
    """`[K]`."""
    eps: float
    """What is added to the mean of squares."""


def pair(
    ids: TensorValue,
    matrix: Matrix,
    columns: int,
    id_norm: Norm | None,
    x: TensorValue,
    x_norm: Norm | None,
) -> TensorValue:
    """Rows of a matrix by their numbers, beside those of x: float32 `[T, columns + H]`.

    Args:
        ids: int64 `[T]`.
        columns: of the matrix.
        id_norm: of the matrix's rows; None: they are taken as they are.
        x: `[T, H]`.
        x_norm: of x's rows; None: likewise.
    """
    first, second = _norm_parameters(id_norm), _norm_parameters(x_norm)
    return _call(
        "unispec_pair",
        [ids, matrix.stored, _gamma(id_norm), x, _gamma(x_norm)],
        [ids.shape[0], columns + x.shape[1]],
        form=matrix.form,
        **{f"{name}0": value for name, value in first.items()},
        **{f"{name}1": value for name, value in second.items()},
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
    width = attending.heads * attending.head_dim
    out = TensorType(DType.float32, [qkv.shape[0], width], DeviceRef.CPU())
    return _cached("unispec_attention", [qkv, *attending.values], out, attending.parameters)


def store(
    x: TensorValue,
    norm: Norm | None,
    key: Matrix,
    value: Matrix,
    attending: Attending,
) -> None:
    """Rotates and stores keys, and stores values, the products of RMSNorm(x) with two matrices.

    Args:
        x: `[T, K]`.
        norm: of x; None: it is taken as it is.
        key: `[key_heads * D, K]`, whole tiles.
        value: likewise.
        attending: its query heads do not count.
    """
    parameters = {
        "form0": key.form,
        "form1": value.form,
        **_norm_parameters(norm),
        "key_heads": attending.key_heads,
        "head_dim": attending.head_dim,
        "interleaved": int(attending.interleaved),
    }
    values = [x, _gamma(norm), key.stored, value.stored, *attending.values]
    ops.inplace_custom("unispec_store", DeviceRef.CPU(), values, parameters=parameters)


class AttentionHalf(NamedTuple):
    """Of a decoder layer: residual + factor * output(attention(RMSNorm(x))), `[T, N]`."""

    x: TensorValue
    """`[T, K]`."""
    residual: TensorValue
    """`[T, N]`."""
    norm: Norm | None
    """Of x; None: x is taken as it is."""
    projections: Sequence[Matrix]
    """Of queries, keys and values; see `can_join`."""
    output: Matrix
    """`[N, heads * D]`."""
    attending: Attending
    """See `attention`."""
    factor: float
    """Of what is added."""

    @property
    def result(self) -> TensorType:
        """What it gives."""
        return TensorType(DType.float32, self.residual.shape, DeviceRef.CPU())

    @property
    def values(self) -> list[TensorValue | BufferValue]:
        """The operands."""
        stored = [matrix.stored for matrix in (*self.projections, self.output)]
        return [self.x, self.residual, _gamma(self.norm), *stored, *self.attending.values]

    @property
    def parameters(self) -> dict[str, int | str]:
        """Those of the operation."""
        return {
            **{f"form{at}": matrix.form for at, matrix in enumerate(self.projections)},
            "form_out": self.output.form,
            **_norm_parameters(self.norm),
            "factor": _bits(self.factor),
            **self.attending.parameters,
        }


class MLPHalf(NamedTuple):
    """Of a decoder layer: x + factor * down(silu(gate(z)) * up(z)) for z = RMSNorm(x), `[T, K]`."""

    gamma: TensorValue
    """`[K]`, the norm's weight."""
    eps: float
    """The norm's."""
    gate: Matrix
    """`[I, K]`."""
    up: Matrix
    """`[I, K]`, in the same form as `gate`."""
    down: Matrix
    """`[K, I]`."""
    factor: float
    """Of what is added."""

    @property
    def values(self) -> list[TensorValue]:
        """The operands beside x."""
        return [self.gamma, self.gate.stored, self.up.stored, self.down.stored]


def attention_block(half: AttentionHalf) -> TensorValue:
    """The first half of a decoder layer."""
    return _cached("unispec_attention_block", half.values, half.result, half.parameters)


def mlp(x: TensorValue, half: MLPHalf) -> TensorValue:
    """The second half of a decoder layer over x, `[T, K]`."""
    return _call(
        "unispec_mlp",
        [x, *half.values],
        x.shape,
        form=half.gate.form,
        form_down=half.down.form,
        inner=half.gate.rows,
        eps=_bits(half.eps),
        factor=_bits(half.factor),
    )


def decoder_layer(first: AttentionHalf, second: MLPHalf) -> TensorValue:
    """Both halves, to the bit what one after the other gives."""
    parameters = {
        **first.parameters,
        "form_gated": second.gate.form,
        "form_down": second.down.form,
        "inner": second.gate.rows,
        "eps_mlp": _bits(second.eps),
        "factor_mlp": _bits(second.factor),
    }
    values = [*first.values, *second.values]
    return _cached("unispec_decoder_layer", values, first.result, parameters)


def _gamma(norm: Norm | None) -> TensorValue:
    """A norm's weight, or what stands in for it where there is no norm."""
    if norm is None:
        return ops.constant(0.0, DType.float32, DeviceRef.CPU()).reshape([1])
    return norm.weight


def _norm_parameters(norm: Norm | None) -> dict[str, int | str]:
    return {"normed": int(norm is not None), "eps": 0 if norm is None else _bits(norm.eps)}


def _cached(
    name: str,
    values: Sequence[TensorValue | BufferValue],
    out: TensorType,
    parameters: dict[str, int | str],
) -> TensorValue:
    """Calls an operation that writes to the cache."""
    called = ops.inplace_custom(name, DeviceRef.CPU(), values, [out], parameters=parameters)
    return called[0].tensor


def _call(
    name: str, values: Sequence[TensorValue], shape: Sequence[int | Dim], **parameters: Any
) -> TensorValue:
    out = TensorType(DType.float32, shape, DeviceRef.CPU())
    return ops.custom(name, DeviceRef.CPU(), values, [out], parameters)[0].tensor


def _bits(number: float) -> int:
    """A float32 as an integer: an operation's parameters are no floats in max 26.7."""
    bits: int = struct.unpack("<i", struct.pack("<f", number))[0]
    return bits
