"""Rows of a matrix by their numbers."""
import extensibility
from extensibility import InputTensor, OutputTensor
from max.gpu.host import DeviceContext

from .activations import write_row
from .formats import LANES, block_bytes, codes, group_size, groups_per_block, has_least, is_rows, least, scale, unit_bytes, zero
from .linear import number
from .operations import check, check_gamma
from .product import load_row


@always_inline
def _read[form: StaticString](w: ImmPointer[UInt8, _], id: Int, row: MutPointer[Float32, _], K: Int):
    """Writes row `id` of W `[., K]`."""
    comptime if is_rows[form]():
        var start = w.unsafe_offset(id * (unit_bytes[form](K) // LANES))
        var whole = K // LANES * LANES
        for k in range(0, whole, LANES):
            row.unsafe_store(k, load_row[form, LANES](start, k))
        for k in range(whole, K):
            row.unsafe_store(k, load_row[form, 1](start, k))
    else:
        comptime G = group_size[form]()
        comptime PER_BLOCK = groups_per_block[form]()
        var lane = id % LANES
        var unit = w.unsafe_offset(id // LANES * unit_bytes[form](K))
        for g in range(K // G):
            var block = unit.unsafe_offset(g // PER_BLOCK * block_bytes[form]())
            var d = scale[form](block, g % PER_BLOCK)[lane]
            var m = Float32(0)
            comptime if has_least[form]():
                m = least[form](block, g % PER_BLOCK)[lane]
            comptime for four in range(G // 4):
                var c = codes[form, four](block, g % PER_BLOCK)
                for k in range(4):
                    var q = c[4 * lane + k].cast[DType.int32]() - Int32(zero[form]())
                    row.unsafe_store(G * g + 4 * four + k, q.cast[DType.float32]() * d - m)


@extensibility.register("unispec_embedding")
struct Embedding:
    """Rows of W, `[T, K]`, by their numbers `[T]`."""

    @staticmethod
    def execute[
        form: StaticString, target: StaticString
    ](
        y: OutputTensor[dtype=DType.float32, rank=2, ...],
        ids: InputTensor[dtype=DType.int64, rank=1, ...],
        w: InputTensor[rank=2, ...],
        ctx: DeviceContext,
    ) raises:
        var K = y.dim_size[1]()
        var weights = w.unsafe_ptr().unsafe_bitcast[UInt8]()
        for t in range(ids.dim_size[0]()):
            _read[form](weights, Int(ids.unsafe_ptr().unsafe_load(t)), y.unsafe_ptr().unsafe_offset(t * K), K)


@extensibility.register("unispec_pair")
struct Pair:
    """Rows of W by their numbers `[T]` beside rows of x `[T, H]`, each after an RMSNorm if `normed`."""

    @staticmethod
    def execute[
        form: StaticString,
        normed0: Int,
        eps0: Int,
        normed1: Int,
        eps1: Int,
        target: StaticString,
    ](
        y: OutputTensor[dtype=DType.float32, rank=2, ...],
        ids: InputTensor[dtype=DType.int64, rank=1, ...],
        w: InputTensor[rank=2, ...],
        gamma0: InputTensor[dtype=DType.float32, rank=1, ...],
        x: InputTensor[dtype=DType.float32, rank=2, ...],
        gamma1: InputTensor[dtype=DType.float32, rank=1, ...],
        ctx: DeviceContext,
    ) raises:
        var H = x.dim_size[1]()
        var K = y.dim_size[1]() - H
        check[form](w.dim_size[1](), K)
        if x.dim_size[0]() != ids.dim_size[0]():
            raise Error(t"{ids.dim_size[0]()} ids were given, and {x.dim_size[0]()} rows beside them")
        comptime if normed0 == 1:
            check_gamma(gamma0.dim_size[0](), K)
        comptime if normed1 == 1:
            check_gamma(gamma1.dim_size[0](), H)
        var weights = w.unsafe_ptr().unsafe_bitcast[UInt8]()
        for t in range(ids.dim_size[0]()):
            var row = y.unsafe_ptr().unsafe_offset(t * (K + H))
            _read[form](weights, Int(ids.unsafe_ptr().unsafe_load(t)), row, K)
            comptime if normed0 == 1:
                write_row["f32", True](
                    row, gamma0.unsafe_ptr(), number[eps0](), row.unsafe_bitcast[UInt8](), K
                )
            write_row["f32", normed1 == 1](
                x.unsafe_ptr().unsafe_offset(t * H),
                gamma1.unsafe_ptr(),
                number[eps1](),
                row.unsafe_offset(K).unsafe_bitcast[UInt8](),
                H,
            )
