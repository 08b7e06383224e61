"""Rows of a matrix by their numbers."""
import extensibility
from extensibility import InputTensor, OutputTensor
from max.gpu.host import DeviceContext

from .formats import LANES, block_bytes, codes, group_size, groups_per_block, has_least, is_rows, least, scale, unit_bytes, zero
from .product import load_row


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
            var id = Int(ids.unsafe_ptr().unsafe_load(t))
            var row = y.unsafe_ptr().unsafe_offset(t * K)
            comptime if is_rows[form]():
                var start = weights.unsafe_offset(id * (unit_bytes[form](K) // LANES))
                var whole = K // LANES * LANES
                for k in range(0, whole, LANES):
                    row.unsafe_store(k, load_row[form, LANES](start, k))
                for k in range(whole, K):
                    row.unsafe_store(k, load_row[form, 1](start, k))
            else:
                comptime G = group_size[form]()
                comptime PER_BLOCK = groups_per_block[form]()
                var lane = id % LANES
                var unit = weights.unsafe_offset(id // LANES * unit_bytes[form](K))
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
