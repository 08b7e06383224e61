"""What a product reads of x, made once for all of its weights.

Beside floats, x is taken as it is. Beside blocks, it is taken as integers of 16 bits with a scale for each
group of 32 columns: its error is at most 1/65024 of the largest one of the group. A row's integers are stored as
K upper bytes, then K lower ones, both signed, then K / 32 scales and an offset for each group of the
weights.
"""
from std.math import round, sqrt

from .formats import F, LANES, group_size, has_least, is_rows, zero

comptime GROUP = 32
"""Columns that share a scale."""
comptime _LARGEST = 127 * 256
comptime _LEAST = Float32(1e-30)
"""What is smaller is taken as 0: its inverse may not be a float32."""
comptime _Wide = SIMD[DType.float32, GROUP]


def row_bytes[form: StaticString](K: Int) -> Int:
    """Bytes of a row of x beside weights of that form."""
    comptime if is_rows[form]():
        return 4 * K
    return 2 * K + K // 8 + K // 4


@always_inline
def row_scale(row: ImmPointer[UInt8, _], K: Int, at: Int) -> Float32:
    """Scale of the columns from 32 * at."""
    return row.unsafe_offset(2 * K).unsafe_bitcast[Float32]().unsafe_load(at)


@always_inline
def offset[dtype: DType](row: ImmPointer[UInt8, _], K: Int, g: Int) -> Scalar[dtype]:
    """What group g of the weights adds to a sum, see `_write_offset`."""
    return row.unsafe_offset(2 * K + K // 8).unsafe_bitcast[Scalar[dtype]]().unsafe_load(g)


@always_inline
def _write_offset[form: StaticString](row: MutPointer[UInt8, _], K: Int, g: Int, sum: Int32, scale: Float32):
    """Where codes have a zero, their sum is too large by as many times the sum of x (int32); where a
    group has a least number, it is subtracted as many times as the sum of x (float32)."""
    var offsets = row.unsafe_offset(2 * K + K // 8)
    comptime if has_least[form]():
        offsets.unsafe_bitcast[Float32]().unsafe_store(g, -scale * sum.cast[DType.float32]())
    else:
        offsets.unsafe_bitcast[Int32]().unsafe_store(g, Int32(-zero[form]()) * sum)


@always_inline
def _write_group[form: StaticString](v: _Wide, row: MutPointer[UInt8, _], K: Int, at: Int):
    """Writes the columns from 32 * at as integers."""
    var largest = abs(v).reduce_max()
    # No number of a sum is finite where one of x is not: 0 times a scale of NaN says so.
    var is_finite = (v - v).reduce_add() == 0
    var is_some = is_finite and largest >= _LEAST
    var scale = largest / _LARGEST if is_finite else Float32(0) / Float32(0)
    var inverse = Float32(_LARGEST) / largest if is_some else Float32(0)
    var q = SIMD[DType.int32, GROUP](0)
    if is_some:
        q = round(v * inverse).cast[DType.int32]()
    # The lower byte is signed, so the upper one is rounded, not cut.
    var upper = (q + 128) >> 8
    row.unsafe_store(GROUP * at, upper.cast[DType.uint8]())
    row.unsafe_store(K + GROUP * at, (q - (upper << 8)).cast[DType.uint8]())
    row.unsafe_offset(2 * K).unsafe_bitcast[Float32]().unsafe_store(at, scale)
    comptime if group_size[form]() == 16:
        _write_offset[form](row, K, 2 * at, q.slice[16]().reduce_add(), scale)
        _write_offset[form](row, K, 2 * at + 1, q.slice[16, offset=16]().reduce_add(), scale)
    else:
        _write_offset[form](row, K, at, q.reduce_add(), scale)


@always_inline
def inverse_rms(x: ImmPointer[Float32, _], K: Int, eps: Float32) -> Float32:
    """What RMSNorm multiplies a row by."""
    var squares = F(0)
    var whole = K // LANES * LANES
    for k in range(0, whole, LANES):
        var v = x.unsafe_load[width=LANES](k)
        squares = v.fma(v, squares)
    var total = squares.reduce_add()
    for k in range(whole, K):
        total = x.unsafe_load(k).fma(x.unsafe_load(k), total)
    return 1 / sqrt(total / Float32(K) + eps)


@always_inline
def write_row[
    form: StaticString, normed: Bool
](x: ImmPointer[Float32, _], gamma: ImmPointer[Float32, _], eps: Float32, row: MutPointer[UInt8, _], K: Int):
    """Writes one row of x, after an RMSNorm with weight gamma `[K]` if `normed`."""
    var factor = Float32(1)
    comptime if normed:
        factor = inverse_rms(x, K, eps)
    comptime if is_rows[form]():
        var floats = row.unsafe_bitcast[Float32]()
        var whole = K // LANES * LANES
        for k in range(0, whole, LANES):
            var v = x.unsafe_load[width=LANES](k)
            comptime if normed:
                v = v * factor * gamma.unsafe_load[width=LANES](k)
            floats.unsafe_store(k, v)
        for k in range(whole, K):
            var v = x.unsafe_load(k)
            comptime if normed:
                v = v * factor * gamma.unsafe_load(k)
            floats.unsafe_store(k, v)
    else:
        for at in range(K // GROUP):
            var v = x.unsafe_load[width=GROUP](GROUP * at)
            comptime if normed:
                v = v * factor * gamma.unsafe_load[width=GROUP](GROUP * at)
            _write_group[form](v, row, K, at)
