"""Some rows of x times some of W. Each sum has its own order, whatever is computed beside it."""
from std.collections import Array
from std.memory import bitcast
from std.sys import CompilationTarget, llvm_intrinsic
from std.utils import IndexList

from .activations import offset, row_bytes, row_scale
from .formats import (
    Codes,
    F,
    I,
    LANES,
    block_bytes,
    codes,
    group_size,
    groups_per_block,
    has_least,
    least,
    scale,
    unit_bytes,
    zero,
)


@always_inline
def _dot4(acc: I, w: Codes, x: ImmPointer[UInt8, _], at: Int) -> I:
    """Adds to each lane the products of 4 unsigned codes with 4 signed bytes of x."""
    var four = x.unsafe_offset(at).unsafe_bitcast[Int32]().unsafe_load()
    comptime if CompilationTarget.has_vnni() and CompilationTarget.has_avx512f():
        return llvm_intrinsic["llvm.x86.avx512.vpdpbusd.512", I](acc, w, bitcast[DType.uint8, 4 * LANES](I(four)))
    var words = bitcast[DType.int32, LANES](w)
    var sum = acc
    comptime for c in range(4):
        sum += ((words >> Int32(8 * c)) & 255) * I((four << Int32(24 - 8 * c)) >> 24)
    return sum


@always_inline
def blocks[
    form: StaticString, TM: Int, TN: Int
](x: ImmPointer[UInt8, _], w: ImmPointer[UInt8, _], apart: Int, K: Int) -> Array[F, TM * TN]:
    """TM rows of x times TN units of blocks, which are `apart` bytes apart."""
    comptime G = group_size[form]()
    comptime PER_BLOCK = groups_per_block[form]()
    comptime BLOCK = block_bytes[form]()
    var row = row_bytes[form](K)
    var acc = Array[F, TM * TN](fill=0)
    for b in range(K // (G * PER_BLOCK)):
        for g in range(PER_BLOCK):
            var at = b * PER_BLOCK + g
            var high = Array[I, TM * TN](fill=0)
            var low = Array[I, TM * TN](fill=0)
            comptime if zero[form]() > 0:
                comptime for i in range(TM):
                    comptime for j in range(TN):
                        low[i * TN + j] = I(offset[DType.int32](x.unsafe_offset(i * row), K, at))
            comptime for four in range(G // 4):
                comptime for j in range(TN):
                    var c = codes[form, four](w.unsafe_offset(j * apart + b * BLOCK), g)
                    comptime for i in range(TM):
                        var k = i * row + G * at + 4 * four
                        high[i * TN + j] = _dot4(high[i * TN + j], c, x, k)
                        low[i * TN + j] = _dot4(low[i * TN + j], c, x, k + K)
            comptime for j in range(TN):
                var block = w.unsafe_offset(j * apart + b * BLOCK)
                var d = scale[form](block, g)
                comptime for i in range(TM):
                    var total = ((high[i * TN + j] << 8) + low[i * TN + j]).cast[DType.float32]()
                    var s = row_scale(x.unsafe_offset(i * row), K, at * G // 32)
                    acc[i * TN + j] = total.fma(d * F(s), acc[i * TN + j])
                comptime if has_least[form]():
                    var m = least[form](block, g)
                    comptime for i in range(TM):
                        var taken = offset[DType.float32](x.unsafe_offset(i * row), K, at)
                        acc[i * TN + j] = m.fma(F(taken), acc[i * TN + j])
    return acc^


@always_inline
def load_row[form: StaticString, width: Int](w: ImmPointer[UInt8, _], at: Int) -> SIMD[DType.float32, width]:
    """Columns of a row of floats; all forms are widened exactly."""
    comptime if form == "f32":
        return w.unsafe_bitcast[Float32]().unsafe_load[width=width](at)
    comptime if form == "bf16":
        var bits = w.unsafe_bitcast[UInt16]().unsafe_load[width=width](at).cast[DType.uint32]() << 16
        return bitcast[DType.float32, width](bits)
    return w.unsafe_bitcast[Float16]().unsafe_load[width=width](at).cast[DType.float32]()


def _halves[H: Int](across: Int) -> IndexList[LANES]:
    """Lanes of two vectors in groups of 2 * H: the lower half of one and the upper half of the other if `across` is 0,
    and if it is H the other halves, which stand across from them."""
    var mask = IndexList[LANES]()
    for lane in range(LANES):
        mask[lane] = (lane ^ across) + LANES * (lane // H % 2)
    return mask


@always_inline
def sums(var v: Array[F, LANES]) -> F:
    """Sums each of 16 vectors: lanes i and i + 8 first, then what is 4, 2 and 1 apart."""
    comptime for level in range(4):
        comptime H = LANES // 2 >> level
        comptime for r in range(H):
            # The first of the two moves no lane, so only the other one waits for its turn to shuffle.
            v[r] = v[r].shuffle[_halves[H](0)](v[r + H]) + v[r].shuffle[_halves[H](H)](v[r + H])
    return v[0]


@always_inline
def rows[
    form: StaticString, TM: Int, TN: Int
](x: ImmPointer[UInt8, _], w: ImmPointer[UInt8, _], apart: Int, K: Int) -> F:
    """TM rows of x times TN rows each of 16 / TM / TN places, `apart` bytes apart: `[TM, places, TN]`."""
    comptime PLACES = LANES // TM // TN
    var floats = x.unsafe_bitcast[Float32]()
    var acc = Array[F, LANES](fill=0)
    var whole = K // LANES * LANES
    comptime for n in range(TN):
        for k in range(0, whole, LANES):
            comptime for p in range(PLACES):
                var wv = load_row[form, LANES](w.unsafe_offset(p * apart), n * K + k)
                comptime for i in range(TM):
                    comptime at = (i * PLACES + p) * TN + n
                    acc[at] = floats.unsafe_load[width=LANES](i * K + k).fma(wv, acc[at])
    var y = sums(acc^)
    for k in range(whole, K):
        comptime for p in range(PLACES):
            comptime for n in range(TN):
                var one = load_row[form, 1](w.unsafe_offset(p * apart), n * K + k)
                comptime for i in range(TM):
                    comptime at = (i * PLACES + p) * TN + n
                    y[at] = one.fma(floats.unsafe_load(i * K + k), y[at])
    return y


@always_inline
def row[form: StaticString](x: ImmPointer[UInt8, _], w: ImmPointer[UInt8, _], K: Int) -> Float32:
    """One row of x times one of W, summed as in `rows`."""
    var floats = x.unsafe_bitcast[Float32]()
    var acc = Array[F, LANES](fill=0)
    var whole = K // LANES * LANES
    for k in range(0, whole, LANES):
        acc[0] = floats.unsafe_load[width=LANES](k).fma(load_row[form, LANES](w, k), acc[0])
    var y = sums(acc^)[0]
    for k in range(whole, K):
        y = load_row[form, 1](w, k).fma(floats.unsafe_load(k), y)
    return y
