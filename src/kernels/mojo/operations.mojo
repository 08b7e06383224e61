"""The operations, as MAX's graph calls them.

A number that is no integer is a parameter by the bits of its float32.
"""
import extensibility
from extensibility import IOSpec, InputTensor, ManagedTensorSlice, OutputTensor
from max.algorithm import sync_parallelize
from max.gpu.host import DeviceContext
from max.runtime.asyncrt import parallelism_level
from std.memory import alloc, dealloc
from std.memory.alloc import Layout

from .activations import row_bytes
from .attention import Attending
from .formats import is_rows, unit_bytes
from .linear import Projections, gated, multiply, number, prepare
from .phases import COUNTERS, Bytes, Floats, Integers, Phases

comptime MutableInputTensor = ManagedTensorSlice[IOSpec[_, _].MutableInput, static_spec=_]


@always_inline
def floats(p: ImmPointer[Float32, _]) -> Floats:
    return p.unsafe_mut_cast[True]().unsafe_origin_cast[MutUntrackedOrigin]()


@always_inline
def integers(p: ImmPointer[UInt32, _]) -> Integers:
    return p.unsafe_bitcast[Int32]().unsafe_mut_cast[True]().unsafe_origin_cast[MutUntrackedOrigin]()


@always_inline
def bytes(p: ImmPointer[UInt8, _]) -> Bytes:
    return p.unsafe_mut_cast[True]().unsafe_origin_cast[MutUntrackedOrigin]()


@always_inline
def check[form: StaticString](columns: Int, K: Int) raises:
    """Raises if weights that have so many columns as they are stored are not for rows of x of K."""
    if columns != (K if is_rows[form]() else unit_bytes[form](K)):
        raise Error(t"weights with {columns} stored columns in the form {form} are not for rows of {K} numbers")


@extensibility.register("unispec_linear")
struct Linear:
    """The product x `[M, K]` W^T, `[M, N]`."""

    @staticmethod
    def execute[
        form: StaticString, target: StaticString
    ](
        y: OutputTensor[dtype=DType.float32, rank=2, ...],
        x: InputTensor[dtype=DType.float32, rank=2, ...],
        w: InputTensor[rank=2, ...],
        ctx: DeviceContext,
    ) raises:
        check[form](w.dim_size[1](), x.dim_size[1]())
        var yp = floats(y.unsafe_ptr())
        _product[form, False](yp, floats(x.unsafe_ptr()), bytes(w.unsafe_ptr().unsafe_bitcast[UInt8]()), yp, 0,
            x.dim_size[0](), x.dim_size[1](), y.dim_size[1]())


@extensibility.register("unispec_linear_add")
struct LinearAdd:
    """The residual r `[M, N]` + factor * x `[M, K]` W^T."""

    @staticmethod
    def execute[
        form: StaticString, factor: Int, target: StaticString
    ](
        y: OutputTensor[dtype=DType.float32, rank=2, ...],
        x: InputTensor[dtype=DType.float32, rank=2, ...],
        w: InputTensor[rank=2, ...],
        r: InputTensor[dtype=DType.float32, rank=2, ...],
        ctx: DeviceContext,
    ) raises:
        check[form](w.dim_size[1](), x.dim_size[1]())
        _product[form, True](floats(y.unsafe_ptr()), floats(x.unsafe_ptr()),
            bytes(w.unsafe_ptr().unsafe_bitcast[UInt8]()), floats(r.unsafe_ptr()), number[factor](),
            x.dim_size[0](), x.dim_size[1](), y.dim_size[1]())


def _product[
    form: StaticString, add: Bool
](y: Floats, x: Floats, w: Bytes, r: Floats, factor: Float32, M: Int, K: Int, N: Int):
    var tasks = parallelism_level(None)
    comptime packs = not is_rows[form]()
    var counters = alloc(Layout[Int64](count=COUNTERS))
    var scratch = alloc(Layout[UInt8](count=M * row_bytes[form](K) if packs else 1))
    var rows = bytes(scratch.unsafe_ptr()) if packs else x.unsafe_bitcast[UInt8]()
    var p = Phases(counters.unsafe_ptr(), tasks)

    def task(t: Int) {var p, var x, var w, var y, var r, var factor, var rows, var M, var K, var N, imm}:
        comptime if packs:
            prepare[form, False](p, 0, x, x, 0, rows, M, K)
        multiply[form, add](p, 1, rows, w, y, r, factor, M, K, N)

    sync_parallelize(task, tasks)
    dealloc(scratch^)
    dealloc(counters^)


@extensibility.register("unispec_normed_linear")
struct NormedLinear:
    """The product rms_norm(x `[M, K]`) W^T, `[M, N]`, W the rows of three matrices, the first two of whole units."""

    @staticmethod
    def execute[
        form0: StaticString, form1: StaticString, form2: StaticString, eps: Int, target: StaticString
    ](
        y: OutputTensor[dtype=DType.float32, rank=2, ...],
        x: InputTensor[dtype=DType.float32, rank=2, ...],
        gamma: InputTensor[dtype=DType.float32, rank=1, ...],
        w0: InputTensor[rank=2, ...],
        w1: InputTensor[rank=2, ...],
        w2: InputTensor[rank=2, ...],
        ctx: DeviceContext,
    ) raises:
        check[form0](w0.dim_size[1](), x.dim_size[1]())
        check[form1](w1.dim_size[1](), x.dim_size[1]())
        check[form2](w2.dim_size[1](), x.dim_size[1]())
        var qkv = Projections[form0, form1, form2](
            bytes(w0.unsafe_ptr().unsafe_bitcast[UInt8]()),
            bytes(w1.unsafe_ptr().unsafe_bitcast[UInt8]()),
            bytes(w2.unsafe_ptr().unsafe_bitcast[UInt8]()),
            w0.dim_size[0](),
            w1.dim_size[0](),
            x.dim_size[0](),
            x.dim_size[1](),
            y.dim_size[1](),
        )
        var tasks = parallelism_level(None)
        var counters = alloc(Layout[Int64](count=COUNTERS))
        var scratch = alloc(Layout[UInt8](count=qkv.scratch_size()))
        var rows = bytes(scratch.unsafe_ptr())
        var p = Phases(counters.unsafe_ptr(), tasks)
        var xp = floats(x.unsafe_ptr())
        var gp = floats(gamma.unsafe_ptr())
        var yp = floats(y.unsafe_ptr())

        def task(t: Int) {var p, var qkv, var xp, var gp, var yp, var rows, imm}:
            qkv.run[True](p, 0, xp, gp, number[eps](), rows, yp)

        sync_parallelize(task, tasks)
        dealloc(scratch^)
        dealloc(counters^)


@extensibility.register("unispec_mlp")
struct MLP:
    """x `[M, K]` + factor * (silu(z G^T) * (z U^T)) D^T for z = rms_norm(x); G and U have one form."""

    @staticmethod
    def execute[
        form: StaticString, form_down: StaticString, inner: Int, eps: Int, factor: Int, target: StaticString
    ](
        y: OutputTensor[dtype=DType.float32, rank=2, ...],
        x: InputTensor[dtype=DType.float32, rank=2, ...],
        gamma: InputTensor[dtype=DType.float32, rank=1, ...],
        gate: InputTensor[rank=2, ...],
        up: InputTensor[rank=2, ...],
        down: InputTensor[rank=2, ...],
        ctx: DeviceContext,
    ) raises:
        var M = x.dim_size[0]()
        var K = x.dim_size[1]()
        comptime I = inner
        check[form](gate.dim_size[1](), K)
        check[form](up.dim_size[1](), K)
        check[form_down](down.dim_size[1](), I)
        var tasks = parallelism_level(None)
        comptime packs = not is_rows[form_down]()
        var counters = alloc(Layout[Int64](count=COUNTERS))
        var normed = alloc(Layout[UInt8](count=M * row_bytes[form](K)))
        var hidden = alloc(Layout[Float32](count=2 * M * I))
        var packed = alloc(Layout[UInt8](count=M * row_bytes[form_down](I) if packs else 1))
        var p = Phases(counters.unsafe_ptr(), tasks)
        var zp = bytes(normed.unsafe_ptr())
        var hp = floats(hidden.unsafe_ptr())
        var rows = bytes(packed.unsafe_ptr()) if packs else hp.unsafe_bitcast[UInt8]()
        var xp = floats(x.unsafe_ptr())
        var np = floats(gamma.unsafe_ptr())
        var yp = floats(y.unsafe_ptr())
        var gp = bytes(gate.unsafe_ptr().unsafe_bitcast[UInt8]())
        var wp = bytes(up.unsafe_ptr().unsafe_bitcast[UInt8]())
        var dp = bytes(down.unsafe_ptr().unsafe_bitcast[UInt8]())

        def task(t: Int) {var p, var xp, var np, var yp, var gp, var wp, var dp, var zp, var hp, var rows, var M, var K, imm}:
            prepare[form, True](p, 0, xp, np, number[eps](), zp, M, K)
            gated[form](p, 1, zp, gp, wp, hp, hp.unsafe_offset(M * I), M, K, I)
            comptime if packs:
                prepare[form_down, False](p, 2, hp, hp, 0, rows, M, I)
            multiply[form_down, True](p, 3, rows, dp, yp, xp, number[factor](), M, I, K)

        sync_parallelize(task, tasks)
        dealloc(packed^)
        dealloc(hidden^)
        dealloc(normed^)
        dealloc(counters^)


@extensibility.register("unispec_attention")
struct Attention:
    """Attention of ragged rows, causal; see `Attending` for the operands."""

    @staticmethod
    def execute[
        heads: Int, key_heads: Int, head_dim: Int, scale: Int, interleaved: Int, target: StaticString
    ](
        y: OutputTensor[dtype=DType.float32, rank=2, ...],
        qkv: InputTensor[dtype=DType.float32, rank=2, ...],
        offsets: InputTensor[dtype=DType.uint32, rank=1, ...],
        freqs: InputTensor[dtype=DType.float32, rank=2, ...],
        blocks: MutableInputTensor[dtype=DType.float32, rank=6, ...],
        page_stride: InputTensor[dtype=DType.int64, rank=1, ...],
        lengths: InputTensor[dtype=DType.uint32, rank=1, ...],
        table: InputTensor[dtype=DType.uint32, rank=2, ...],
        layer: InputTensor[dtype=DType.uint32, rank=1, ...],
        ctx: DeviceContext,
    ) raises:
        var tasks = parallelism_level(None)
        var a = Attending[heads, key_heads, head_dim, interleaved == 1](
            floats(qkv.unsafe_ptr()),
            floats(y.unsafe_ptr()),
            floats(freqs.unsafe_ptr()),
            integers(offsets.unsafe_ptr()),
            integers(lengths.unsafe_ptr()),
            integers(table.unsafe_ptr()),
            floats(blocks.unsafe_ptr()),
            Int(layer.unsafe_ptr().unsafe_load(0)),
            blocks.dim_size[2](),
            blocks.dim_size[3](),
            Int(page_stride.unsafe_ptr().unsafe_load(0)),
            table.dim_size[1](),
            number[scale](),
            qkv.dim_size[0](),
            lengths.dim_size[0](),
            tasks,
        )
        var counters = alloc(Layout[Int64](count=COUNTERS))
        var scratch = alloc(Layout[Float32](count=a.scratch_size()))
        a.scratch = floats(scratch.unsafe_ptr())
        var p = Phases(counters.unsafe_ptr(), tasks)

        def task(t: Int) {var p, var a, imm}:
            a.run(p, 0, t)

        sync_parallelize(task, tasks)
        dealloc(scratch^)
        dealloc(counters^)


@extensibility.register("unispec_attention_block")
struct AttentionBlock:
    """The residual r `[T, N]` + factor * attention(rms_norm(x `[T, K]`)) O^T; see `Attending`.

    Queries, keys and values are the products with three matrices. x is taken as it is where `normed` is 0.
    """

    @staticmethod
    def execute[
        form0: StaticString,
        form1: StaticString,
        form2: StaticString,
        form_out: StaticString,
        normed: Int,
        eps: Int,
        factor: Int,
        heads: Int,
        key_heads: Int,
        head_dim: Int,
        scale: Int,
        interleaved: Int,
        target: StaticString,
    ](
        y: OutputTensor[dtype=DType.float32, rank=2, ...],
        x: InputTensor[dtype=DType.float32, rank=2, ...],
        r: InputTensor[dtype=DType.float32, rank=2, ...],
        gamma: InputTensor[dtype=DType.float32, rank=1, ...],
        w0: InputTensor[rank=2, ...],
        w1: InputTensor[rank=2, ...],
        w2: InputTensor[rank=2, ...],
        out_proj: InputTensor[rank=2, ...],
        offsets: InputTensor[dtype=DType.uint32, rank=1, ...],
        freqs: InputTensor[dtype=DType.float32, rank=2, ...],
        blocks: MutableInputTensor[dtype=DType.float32, rank=6, ...],
        page_stride: InputTensor[dtype=DType.int64, rank=1, ...],
        lengths: InputTensor[dtype=DType.uint32, rank=1, ...],
        table: InputTensor[dtype=DType.uint32, rank=2, ...],
        layer: InputTensor[dtype=DType.uint32, rank=1, ...],
        ctx: DeviceContext,
    ) raises:
        comptime A = Attending[heads, key_heads, head_dim, interleaved == 1]
        comptime Q = heads * head_dim
        comptime packs = not is_rows[form_out]()
        var T = x.dim_size[0]()
        var N = y.dim_size[1]()
        var tasks = parallelism_level(None)
        check[form0](w0.dim_size[1](), x.dim_size[1]())
        check[form1](w1.dim_size[1](), x.dim_size[1]())
        check[form2](w2.dim_size[1](), x.dim_size[1]())
        check[form_out](out_proj.dim_size[1](), Q)
        var projections = Projections[form0, form1, form2](
            bytes(w0.unsafe_ptr().unsafe_bitcast[UInt8]()),
            bytes(w1.unsafe_ptr().unsafe_bitcast[UInt8]()),
            bytes(w2.unsafe_ptr().unsafe_bitcast[UInt8]()),
            w0.dim_size[0](),
            w1.dim_size[0](),
            T,
            x.dim_size[1](),
            A.WIDTH,
        )
        var counters = alloc(Layout[Int64](count=COUNTERS))
        var normed_x = alloc(Layout[UInt8](count=projections.scratch_size()))
        var between = alloc(Layout[Float32](count=T * (A.WIDTH + Q)))
        var packed = alloc(Layout[UInt8](count=T * row_bytes[form_out](Q) if packs else 1))
        var zp = bytes(normed_x.unsafe_ptr())
        var qkv = floats(between.unsafe_ptr())
        var attended = qkv.unsafe_offset(T * A.WIDTH)
        var rows = bytes(packed.unsafe_ptr()) if packs else attended.unsafe_bitcast[UInt8]()
        var a = A(
            qkv,
            attended,
            floats(freqs.unsafe_ptr()),
            integers(offsets.unsafe_ptr()),
            integers(lengths.unsafe_ptr()),
            integers(table.unsafe_ptr()),
            floats(blocks.unsafe_ptr()),
            Int(layer.unsafe_ptr().unsafe_load(0)),
            blocks.dim_size[2](),
            blocks.dim_size[3](),
            Int(page_stride.unsafe_ptr().unsafe_load(0)),
            table.dim_size[1](),
            number[scale](),
            T,
            lengths.dim_size[0](),
            tasks,
        )
        var scratch = alloc(Layout[Float32](count=a.scratch_size()))
        a.scratch = floats(scratch.unsafe_ptr())
        var p = Phases(counters.unsafe_ptr(), tasks)
        var xp = floats(x.unsafe_ptr())
        var rp = floats(r.unsafe_ptr())
        var gp = floats(gamma.unsafe_ptr())
        var yp = floats(y.unsafe_ptr())
        var op = bytes(out_proj.unsafe_ptr().unsafe_bitcast[UInt8]())

        def task(t: Int) {var p, var projections, var a, var xp, var rp, var gp, var yp, var op, var zp, var qkv, var attended, var rows, var T, var N, imm}:
            projections.run[normed == 1](p, 0, xp, gp, number[eps](), zp, qkv)
            a.run(p, 2, t)
            comptime if packs:
                prepare[form_out, False](p, 5, attended, attended, 0, rows, T, Q)
            multiply[form_out, True](p, 6, rows, op, yp, rp, number[factor](), T, Q, N)

        sync_parallelize(task, tasks)
        dealloc(scratch^)
        dealloc(packed^)
        dealloc(between^)
        dealloc(normed_x^)
        dealloc(counters^)
