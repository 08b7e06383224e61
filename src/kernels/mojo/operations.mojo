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
from .formats import LANES, is_rows, unit_bytes
from .halves import AttentionHalf, MLPHalf
from .linear import Projections, multiply, number, prepare
from .phases import COUNTERS, MOST, Bytes, Floats, Integers, Phases

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


@always_inline
def check_rows[form: StaticString](rows: Int, N: Int) raises:
    """Raises if weights with so many rows as they are stored have no N rows."""
    if rows * (1 if is_rows[form]() else LANES) < N:
        raise Error(t"weights with {rows} stored rows in the form {form} have no {N} rows")


@always_inline
def check_units[form: StaticString](rows: Int, N: Int) raises:
    """Raises if weights with so many rows as they are stored have more or less than N rows."""
    if rows * (1 if is_rows[form]() else LANES) != N:
        raise Error(t"weights with {rows} stored rows in the form {form} have not {N} rows")


@always_inline
def check_gamma(length: Int, K: Int) raises:
    """Raises if a norm's weight is not for rows of x of K."""
    if length != K:
        raise Error(t"a norm's weight of {length} numbers is not for rows of {K} numbers")


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
    """The second half of a decoder layer; see `MLPHalf`."""

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
        var half = _mlp[form, form_down, inner, eps, factor](
            floats(x.unsafe_ptr()), gamma, gate, up, down, floats(y.unsafe_ptr()), x.dim_size[0](), x.dim_size[1]()
        )
        var tasks = parallelism_level(None)
        var counters = alloc(Layout[Int64](count=COUNTERS))
        var scratch = alloc(Layout[UInt8](count=half.scratch_bytes()))
        half.place(bytes(scratch.unsafe_ptr()))
        var p = Phases(counters.unsafe_ptr(), tasks)

        def task(t: Int) {var p, var half, imm}:
            half.run(p, 0)

        sync_parallelize(task, tasks)
        dealloc(scratch^)
        dealloc(counters^)


def _mlp[
    form: StaticString, form_down: StaticString, inner: Int, eps: Int, factor: Int
](
    x: Floats,
    gamma: InputTensor[dtype=DType.float32, rank=1, ...],
    gate: InputTensor[rank=2, ...],
    up: InputTensor[rank=2, ...],
    down: InputTensor[rank=2, ...],
    y: Floats,
    M: Int,
    K: Int,
) raises -> MLPHalf[form, form_down, inner, eps, factor]:
    check[form](gate.dim_size[1](), K)
    check[form](up.dim_size[1](), K)
    check[form_down](down.dim_size[1](), inner)
    check_rows[form](gate.dim_size[0](), inner)
    check_rows[form](up.dim_size[0](), inner)
    check_rows[form_down](down.dim_size[0](), K)
    check_gamma(gamma.dim_size[0](), K)
    return MLPHalf[form, form_down, inner, eps, factor](
        x,
        floats(gamma.unsafe_ptr()),
        bytes(gate.unsafe_ptr().unsafe_bitcast[UInt8]()),
        bytes(up.unsafe_ptr().unsafe_bitcast[UInt8]()),
        bytes(down.unsafe_ptr().unsafe_bitcast[UInt8]()),
        y,
        M,
        K,
    )


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
        var a = _attending[heads, key_heads, head_dim, interleaved](
            qkv.dim_size[0](), number[scale](), tasks, offsets, freqs, blocks, page_stride, lengths, table, layer
        )
        a.qkv = floats(qkv.unsafe_ptr())
        a.result = floats(y.unsafe_ptr())
        var counters = alloc(Layout[Int64](count=COUNTERS))
        var scratch = alloc(Layout[Float32](count=a.scratch_size()))
        a.scratch = floats(scratch.unsafe_ptr())
        var p = Phases(counters.unsafe_ptr(), tasks)

        def task(t: Int) {var p, var a, imm}:
            a.run(p, 0, t)

        sync_parallelize(task, tasks)
        dealloc(scratch^)
        dealloc(counters^)


@extensibility.register("unispec_store")
struct Store:
    """Stores keys and values, the products of rms_norm(x `[T, K]`) with two matrices, keys rotated.

    The rows of the first matrix are whole units. x is taken as it is where `normed` is 0; see `Attending` for the
    other operands.
    """

    @staticmethod
    def execute[
        form0: StaticString,
        form1: StaticString,
        normed: Int,
        eps: Int,
        key_heads: Int,
        head_dim: Int,
        interleaved: Int,
        target: StaticString,
    ](
        x: InputTensor[dtype=DType.float32, rank=2, ...],
        gamma: InputTensor[dtype=DType.float32, rank=1, ...],
        w0: InputTensor[rank=2, ...],
        w1: InputTensor[rank=2, ...],
        offsets: InputTensor[dtype=DType.uint32, rank=1, ...],
        freqs: InputTensor[dtype=DType.float32, rank=2, ...],
        blocks: MutableInputTensor[dtype=DType.float32, rank=6, ...],
        page_stride: InputTensor[dtype=DType.int64, rank=1, ...],
        lengths: InputTensor[dtype=DType.uint32, rank=1, ...],
        table: InputTensor[dtype=DType.uint32, rank=2, ...],
        layer: InputTensor[dtype=DType.uint32, rank=1, ...],
        ctx: DeviceContext,
    ) raises:
        var K = x.dim_size[1]()
        check[form0](w0.dim_size[1](), K)
        check[form1](w1.dim_size[1](), K)
        check_units[form0](w0.dim_size[0](), key_heads * head_dim)
        check_rows[form1](w1.dim_size[0](), key_heads * head_dim)
        comptime if normed == 1:
            check_gamma(gamma.dim_size[0](), K)
        var T = x.dim_size[0]()
        var tasks = parallelism_level(None)
        var a = _attending[key_heads, key_heads, head_dim, interleaved](
            T, 1, tasks, offsets, freqs, blocks, page_stride, lengths, table, layer
        )
        var keys = bytes(w0.unsafe_ptr().unsafe_bitcast[UInt8]())
        # Nothing of the first of three matrices.
        var projections = Projections[form0, form0, form1](
            keys, keys, bytes(w1.unsafe_ptr().unsafe_bitcast[UInt8]()), 0, w0.dim_size[0](), T, K, 2 * a.STRIDE
        )
        var counters = alloc(Layout[Int64](count=COUNTERS))
        var scratch = alloc(Layout[UInt8](count=projections.scratch_size()))
        var entries = alloc(Layout[Float32](count=2 * T * a.STRIDE))
        var p = Phases(counters.unsafe_ptr(), tasks)
        var rows = bytes(scratch.unsafe_ptr())
        var into = floats(entries.unsafe_ptr())
        var xp = floats(x.unsafe_ptr())
        var gp = floats(gamma.unsafe_ptr())

        def task(t: Int) {var p, var a, var projections, var rows, var into, var xp, var gp, imm}:
            projections.run[normed == 1](p, 0, xp, gp, number[eps](), rows, into)
            a.share_entries(p, 2, into)

        sync_parallelize(task, tasks)
        dealloc(entries^)
        dealloc(scratch^)
        dealloc(counters^)


@extensibility.register("unispec_attention_block")
struct AttentionBlock:
    """The first half of a decoder layer; see `AttentionHalf`."""

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
        var tasks = parallelism_level(None)
        var a = _attending[heads, key_heads, head_dim, interleaved](
            x.dim_size[0](), number[scale](), tasks, offsets, freqs, blocks, page_stride, lengths, table, layer
        )
        var half = _attention_half[
            form0, form1, form2, form_out, normed, eps, factor, heads, key_heads, head_dim, interleaved
        ](x, r, gamma, w0, w1, w2, out_proj, a, floats(y.unsafe_ptr()))
        var counters = alloc(Layout[Int64](count=COUNTERS))
        var scratch = alloc(Layout[UInt8](count=half.scratch_bytes()))
        half.place(bytes(scratch.unsafe_ptr()))
        var p = Phases(counters.unsafe_ptr(), tasks)

        def task(t: Int) {var p, var half, imm}:
            half.run(p, 0, t)

        sync_parallelize(task, tasks)
        dealloc(scratch^)
        dealloc(counters^)


@extensibility.register("unispec_decoder_layer")
struct DecoderLayer:
    """Both halves, one after the other; `eps_mlp` and `factor_mlp` are the second one's."""

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
        form_gated: StaticString,
        form_down: StaticString,
        inner: Int,
        eps_mlp: Int,
        factor_mlp: Int,
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
        gamma_mlp: InputTensor[dtype=DType.float32, rank=1, ...],
        gate: InputTensor[rank=2, ...],
        up: InputTensor[rank=2, ...],
        down: InputTensor[rank=2, ...],
        ctx: DeviceContext,
    ) raises:
        var yp = floats(y.unsafe_ptr())
        var tasks = parallelism_level(None)
        var a = _attending[heads, key_heads, head_dim, interleaved](
            x.dim_size[0](), number[scale](), tasks, offsets, freqs, blocks, page_stride, lengths, table, layer
        )
        var first = _attention_half[
            form0, form1, form2, form_out, normed, eps, factor, heads, key_heads, head_dim, interleaved
        ](x, r, gamma, w0, w1, w2, out_proj, a, yp)
        # In place: the first half's result lies where the second one's will.
        var second = _mlp[form_gated, form_down, inner, eps_mlp, factor_mlp](
            yp, gamma_mlp, gate, up, down, yp, x.dim_size[0](), y.dim_size[1]()
        )
        comptime assert first.PHASES + second.PHASES <= MOST
        var counters = alloc(Layout[Int64](count=COUNTERS))
        # A thread begins the second half when all are done with the first one's memory.
        var scratch = alloc(Layout[UInt8](count=max(first.scratch_bytes(), second.scratch_bytes())))
        first.place(bytes(scratch.unsafe_ptr()))
        second.place(bytes(scratch.unsafe_ptr()))
        var p = Phases(counters.unsafe_ptr(), tasks)

        def task(t: Int) {var p, var first, var second, imm}:
            first.run(p, 0, t)
            second.run(p, first.PHASES)

        sync_parallelize(task, tasks)
        dealloc(scratch^)
        dealloc(counters^)


def _attending[
    heads: Int, key_heads: Int, head_dim: Int, interleaved: Int
](
    T: Int,
    scale: Float32,
    tasks: Int,
    offsets: InputTensor[dtype=DType.uint32, rank=1, ...],
    freqs: InputTensor[dtype=DType.float32, rank=2, ...],
    blocks: MutableInputTensor[dtype=DType.float32, rank=6, ...],
    page_stride: InputTensor[dtype=DType.int64, rank=1, ...],
    lengths: InputTensor[dtype=DType.uint32, rank=1, ...],
    table: InputTensor[dtype=DType.uint32, rank=2, ...],
    layer: InputTensor[dtype=DType.uint32, rank=1, ...],
) raises -> Attending[heads, key_heads, head_dim, interleaved == 1]:
    """What it reads and writes beside the cache is to be set."""
    var cache = floats(blocks.unsafe_ptr())
    return Attending[heads, key_heads, head_dim, interleaved == 1](
        cache,
        cache,
        floats(freqs.unsafe_ptr()),
        integers(offsets.unsafe_ptr()),
        integers(lengths.unsafe_ptr()),
        integers(table.unsafe_ptr()),
        cache,
        Int(layer.unsafe_ptr().unsafe_load(0)),
        blocks.dim_size[2](),
        blocks.dim_size[3](),
        Int(page_stride.unsafe_ptr().unsafe_load(0)),
        table.dim_size[1](),
        scale,
        T,
        lengths.dim_size[0](),
        tasks,
    )


def _attention_half[
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
    interleaved: Int,
](
    x: InputTensor[dtype=DType.float32, rank=2, ...],
    r: InputTensor[dtype=DType.float32, rank=2, ...],
    gamma: InputTensor[dtype=DType.float32, rank=1, ...],
    w0: InputTensor[rank=2, ...],
    w1: InputTensor[rank=2, ...],
    w2: InputTensor[rank=2, ...],
    out_proj: InputTensor[rank=2, ...],
    attending: Attending[heads, key_heads, head_dim, interleaved == 1],
    y: Floats,
) raises -> AttentionHalf[
    form0, form1, form2, form_out, normed, eps, factor, heads, key_heads, head_dim, interleaved
]:
    check[form0](w0.dim_size[1](), x.dim_size[1]())
    check[form1](w1.dim_size[1](), x.dim_size[1]())
    check[form2](w2.dim_size[1](), x.dim_size[1]())
    check[form_out](out_proj.dim_size[1](), heads * head_dim)
    check_units[form0](w0.dim_size[0](), heads * head_dim)
    check_units[form1](w1.dim_size[0](), key_heads * head_dim)
    check_rows[form2](w2.dim_size[0](), key_heads * head_dim)
    check_rows[form_out](out_proj.dim_size[0](), r.dim_size[1]())
    comptime if normed == 1:
        check_gamma(gamma.dim_size[0](), x.dim_size[1]())
    if x.dim_size[0]() != r.dim_size[0]():
        raise Error(t"{x.dim_size[0]()} rows of x were given, and a residual of {r.dim_size[0]()}")
    var projections = Projections[form0, form1, form2](
        bytes(w0.unsafe_ptr().unsafe_bitcast[UInt8]()),
        bytes(w1.unsafe_ptr().unsafe_bitcast[UInt8]()),
        bytes(w2.unsafe_ptr().unsafe_bitcast[UInt8]()),
        w0.dim_size[0](),
        w1.dim_size[0](),
        x.dim_size[0](),
        x.dim_size[1](),
        (heads + 2 * key_heads) * head_dim,
    )
    return AttentionHalf[
        form0, form1, form2, form_out, normed, eps, factor, heads, key_heads, head_dim, interleaved
    ](
        projections,
        attending,
        floats(x.unsafe_ptr()),
        floats(r.unsafe_ptr()),
        floats(gamma.unsafe_ptr()),
        bytes(out_proj.unsafe_ptr().unsafe_bitcast[UInt8]()),
        y,
        r.dim_size[1](),
    )
