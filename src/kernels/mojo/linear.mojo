"""Products x W^T for few rows of x and for many, with what stands before and behind them in a layer."""
import extensibility
from extensibility import InputTensor, OutputTensor
from max.algorithm import sync_parallelize
from max.gpu.host import DeviceContext
from max.runtime.asyncrt import parallelism_level
from std.collections import Array
from std.math import ceildiv, exp
from std.memory import alloc, bitcast, dealloc
from std.memory.alloc import Layout

from .activations import row_bytes, write_row
from .formats import F, LANES, is_rows, unit_bytes
from .product import blocks, row, rows

comptime _FEW = 8
"""Rows that one thread prepares faster than several."""


def number[bits: Int]() -> Float32:
    """A float32 by its bits: an operation's parameters are integers."""
    return bitcast[DType.float32, 1](Int32(bits))


@always_inline
def silu(v: F) -> F:
    """The activation v / (1 + exp(-v))."""
    return v / (1 + exp(-v))


@always_inline
def _store[
    add: Bool, width: Int
](y: MutPointer[Float32, _], r: ImmPointer[Float32, _], factor: Float32, v: SIMD[DType.float32, width]):
    """Writes neighbouring numbers, `r + factor * v` where something is added to."""
    comptime if add:
        y.unsafe_store(0, v.fma(SIMD[DType.float32, width](factor), r.unsafe_load[width=width](0)))
    else:
        y.unsafe_store(0, v)


@always_inline
def _store_some[
    add: Bool
](y: MutPointer[Float32, _], r: ImmPointer[Float32, _], factor: Float32, v: F, count: Int):
    """The first `count` of them."""
    if count == LANES:
        _store[add, LANES](y, r, factor, v)
    else:
        for c in range(count):
            _store[add, 1](y.unsafe_offset(c), r.unsafe_offset(c), factor, v[c])


@always_inline
def _rows_at[
    form: StaticString, add: Bool, TM: Int, TN: Int
](
    x: ImmPointer[UInt8, _],
    w: ImmPointer[UInt8, _],
    apart: Int,
    y: MutPointer[Float32, _],
    r: ImmPointer[Float32, _],
    factor: Float32,
    K: Int,
    N: Int,
):
    """TM rows of x times TN rows each of some places of W, `apart` rows apart."""
    comptime PLACES = LANES // TM // TN
    var v = rows[form, TM, TN](x, w, apart * (unit_bytes[form](K) // LANES), K)
    comptime for i in range(TM):
        comptime for p in range(PLACES):
            var at = i * N + p * apart
            comptime first = (i * PLACES + p) * TN
            _store[add, TN](y.unsafe_offset(at), r.unsafe_offset(at), factor, v.slice[TN, offset=first]())


@always_inline
def _blocks_at[
    form: StaticString, add: Bool, TM: Int, TN: Int
](
    x: ImmPointer[UInt8, _],
    w: ImmPointer[UInt8, _],
    apart: Int,
    y: MutPointer[Float32, _],
    r: ImmPointer[Float32, _],
    factor: Float32,
    K: Int,
    N: Int,
    count: Int,
):
    """TM rows of x times TN units of W, `apart` units apart; the last has `count` rows."""
    var acc = blocks[form, TM, TN](x, w, apart * unit_bytes[form](K), K)
    comptime for i in range(TM):
        comptime for j in range(TN):
            var at = i * N + j * apart * LANES
            _store_some[add](
                y.unsafe_offset(at), r.unsafe_offset(at), factor, acc[i * TN + j], LANES if j < TN - 1 else count
            )


@always_inline
def _streams[
    form: StaticString, add: Bool, TM: Int, TN: Int
](
    x: ImmPointer[UInt8, _],
    w: ImmPointer[UInt8, _],
    y: MutPointer[Float32, _],
    r: ImmPointer[Float32, _],
    factor: Float32,
    K: Int,
    N: Int,
    count: Int,
):
    """TM rows of x times `count` rows of W, read as a few streams: one alone does not fill the memory's width."""
    var size = unit_bytes[form](K) // LANES
    comptime if is_rows[form]():
        comptime PLACES = LANES // TM // TN
        var part = count // PLACES // TN * TN
        for n in range(0, part, TN):
            _rows_at[form, add, TM, TN](
                x, w.unsafe_offset(n * size), part, y.unsafe_offset(n), r.unsafe_offset(n), factor, K, N
            )
        for n in range(PLACES * part, count):
            comptime for i in range(TM):
                var v = row[form](x.unsafe_offset(i * row_bytes[form](K)), w.unsafe_offset(n * size), K)
                var at = i * N + n
                _store[add, 1](y.unsafe_offset(at), r.unsafe_offset(at), factor, v)
    else:
        var units = ceildiv(count, LANES)
        var part = units // TN
        var last = count - (units - 1) * LANES
        for u in range(part):
            var whole = LANES if u < part - 1 or part * TN < units else last
            _blocks_at[form, add, TM, TN](
                x,
                w.unsafe_offset(u * LANES * size),
                part,
                y.unsafe_offset(u * LANES),
                r.unsafe_offset(u * LANES),
                factor,
                K,
                N,
                whole,
            )
        for u in range(part * TN, units):
            _blocks_at[form, add, TM, 1](
                x,
                w.unsafe_offset(u * LANES * size),
                1,
                y.unsafe_offset(u * LANES),
                r.unsafe_offset(u * LANES),
                factor,
                K,
                N,
                LANES if u < units - 1 else last,
            )


@always_inline
def _all_rows[
    form: StaticString, add: Bool
](
    x: ImmPointer[UInt8, _],
    w: ImmPointer[UInt8, _],
    y: MutPointer[Float32, _],
    r: ImmPointer[Float32, _],
    factor: Float32,
    M: Int,
    K: Int,
    N: Int,
    count: Int,
):
    """All rows of x times `count` rows of W, into `count` columns of y `[M, N]`."""
    var size = row_bytes[form](K)
    comptime NARROW = is_rows[form]()
    var m = 0
    comptime if not NARROW:
        while m + 8 <= M:
            _streams[form, add, 8, 1](
                x.unsafe_offset(m * size), w, y.unsafe_offset(m * N), r.unsafe_offset(m * N), factor, K, N, count
            )
            m += 8
    while m + 4 <= M:
        _streams[form, add, 4, 2](
            x.unsafe_offset(m * size), w, y.unsafe_offset(m * N), r.unsafe_offset(m * N), factor, K, N, count
        )
        m += 4
    if m + 2 <= M:
        _streams[form, add, 2, 2](
            x.unsafe_offset(m * size), w, y.unsafe_offset(m * N), r.unsafe_offset(m * N), factor, K, N, count
        )
        m += 2
    if m < M:
        _streams[form, add, 1, 4](
            x.unsafe_offset(m * size), w, y.unsafe_offset(m * N), r.unsafe_offset(m * N), factor, K, N, count
        )


@always_inline
def _columns[
    form: StaticString, add: Bool
](
    x: ImmPointer[UInt8, _],
    w: ImmPointer[UInt8, _],
    y: MutPointer[Float32, _],
    r: ImmPointer[Float32, _],
    factor: Float32,
    M: Int,
    K: Int,
    N: Int,
    first: Int,
    stop: Int,
):
    """All rows of x times the rows of W from `first`, which begins a unit, to `stop`."""
    var size = unit_bytes[form](K) // LANES
    # What several rows of x read again stays in the cache.
    var step = stop - first if M <= 4 or stop <= first else LANES
    for n in range(first, stop, max(step, 1)):
        _all_rows[form, add](
            x, w.unsafe_offset(n * size), y.unsafe_offset(n), r.unsafe_offset(n), factor, M, K, N, min(step, stop - n)
        )


def prepare[
    form: StaticString, normed: Bool
](
    x: ImmPointer[Float32, _],
    gamma: ImmPointer[Float32, _],
    eps: Float32,
    into: MutPointer[UInt8, _],
    M: Int,
    K: Int,
):
    """Writes all rows of x as a product reads them."""
    var size = row_bytes[form](K)
    var tasks = parallelism_level(None) if M > _FEW else 1
    var per = ceildiv(M, tasks)

    def task(t: Int) {var x, var gamma, var eps, var into, var M, var K, var size, var per, imm}:
        for m in range(t * per, min(M, t * per + per)):
            write_row[form, normed](x.unsafe_offset(m * K), gamma, eps, into.unsafe_offset(m * size), K)

    if tasks == 1:
        task(0)
    else:
        sync_parallelize(task, tasks)


def multiply[
    form: StaticString, add: Bool
](
    x: ImmPointer[UInt8, _],
    w: ImmPointer[UInt8, _],
    y: MutPointer[Float32, _],
    r: ImmPointer[Float32, _],
    factor: Float32,
    M: Int,
    K: Int,
    N: Int,
):
    """Writes the product, `r + factor *` the product where something is added to, with all threads."""
    var tasks = parallelism_level(None)
    var per = ceildiv(ceildiv(N, LANES), tasks) * LANES

    def task(t: Int) {var x, var w, var y, var r, var factor, var M, var K, var N, var per, imm}:
        _columns[form, add](x, w, y, r, factor, M, K, N, t * per, min(N, t * per + per))

    sync_parallelize(task, tasks)


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
        var M = x.dim_size[0]()
        var K = x.dim_size[1]()
        var N = y.dim_size[1]()
        var xp = x.unsafe_ptr()
        var wp = w.unsafe_ptr().unsafe_bitcast[UInt8]()
        var yp = y.unsafe_ptr()
        comptime if is_rows[form]():
            multiply[form, False](xp.unsafe_bitcast[UInt8](), wp, yp, xp, 0, M, K, N)
        else:
            var scratch = alloc(Layout[UInt8](count=M * row_bytes[form](K)))
            var rows = scratch.unsafe_ptr()
            prepare[form, False](xp, xp, 0, rows, M, K)
            multiply[form, False](rows, wp, yp, xp, 0, M, K, N)
            dealloc(scratch^)


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
        var M = x.dim_size[0]()
        var K = x.dim_size[1]()
        var N = y.dim_size[1]()
        var xp = x.unsafe_ptr()
        var wp = w.unsafe_ptr().unsafe_bitcast[UInt8]()
        var yp = y.unsafe_ptr()
        var rp = r.unsafe_ptr()
        comptime f = number[factor]()
        comptime if is_rows[form]():
            multiply[form, True](xp.unsafe_bitcast[UInt8](), wp, yp, rp, f, M, K, N)
        else:
            var scratch = alloc(Layout[UInt8](count=M * row_bytes[form](K)))
            var rows = scratch.unsafe_ptr()
            prepare[form, False](xp, xp, 0, rows, M, K)
            multiply[form, True](rows, wp, yp, rp, f, M, K, N)
            dealloc(scratch^)


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
        var M = x.dim_size[0]()
        var K = x.dim_size[1]()
        var N = y.dim_size[1]()
        var xp = x.unsafe_ptr()
        var gp = gamma.unsafe_ptr()
        var p0 = w0.unsafe_ptr().unsafe_bitcast[UInt8]()
        var p1 = w1.unsafe_ptr().unsafe_bitcast[UInt8]()
        var p2 = w2.unsafe_ptr().unsafe_bitcast[UInt8]()
        var yp = y.unsafe_ptr()
        # Of forms that are the same, x is prepared once.
        comptime at1 = 0 if form1 == form0 else 1
        comptime at2 = 0 if form2 == form0 else (at1 if form2 == form1 else at1 + 1)
        var size = M * max(row_bytes[form0](K), max(row_bytes[form1](K), row_bytes[form2](K)))
        var scratch = alloc(Layout[UInt8](count=(1 + max(at1, at2)) * size))
        var rows = scratch.unsafe_ptr()
        prepare[form0, True](xp, gp, number[eps](), rows, M, K)
        comptime if at1 == 1:
            prepare[form1, True](xp, gp, number[eps](), rows.unsafe_offset(size), M, K)
        comptime if at2 > at1:
            prepare[form2, True](xp, gp, number[eps](), rows.unsafe_offset(at2 * size), M, K)
        var n0 = w0.dim_size[0]() * (1 if is_rows[form0]() else LANES)
        var n1 = n0 + w1.dim_size[0]() * (1 if is_rows[form1]() else LANES)
        var tasks = parallelism_level(None)
        var per = ceildiv(ceildiv(N, LANES), tasks) * LANES

        def task(t: Int) {var rows, var size, var xp, var p0, var p1, var p2, var yp, var M, var K, var N, var n0, var n1, var per, imm}:
            var first = t * per
            var stop = min(N, first + per)
            _columns[form0, False](rows, p0, yp, xp, 0, M, K, N, first, min(stop, n0))
            var y1 = yp.unsafe_offset(n0)
            var x1 = rows.unsafe_offset(at1 * size)
            _columns[form1, False](x1, p1, y1, xp, 0, M, K, N, max(first - n0, 0), min(stop, n1) - n0)
            var y2 = yp.unsafe_offset(n1)
            var x2 = rows.unsafe_offset(at2 * size)
            _columns[form2, False](x2, p2, y2, xp, 0, M, K, N, max(first - n1, 0), stop - n1)

        sync_parallelize(task, tasks)
        dealloc(scratch^)


@extensibility.register("unispec_normed_gated")
struct NormedGated:
    """Computes silu(z G^T) * (z U^T) `[M, N]` for z = rms_norm(x `[M, K]`)."""

    @staticmethod
    def execute[
        form: StaticString, eps: Int, target: StaticString
    ](
        y: OutputTensor[dtype=DType.float32, rank=2, ...],
        x: InputTensor[dtype=DType.float32, rank=2, ...],
        gamma: InputTensor[dtype=DType.float32, rank=1, ...],
        gate: InputTensor[rank=2, ...],
        up: InputTensor[rank=2, ...],
        ctx: DeviceContext,
    ) raises:
        var M = x.dim_size[0]()
        var K = x.dim_size[1]()
        var N = y.dim_size[1]()
        var scratch = alloc(Layout[UInt8](count=M * row_bytes[form](K)))
        var xp = scratch.unsafe_ptr()
        var gp = gate.unsafe_ptr().unsafe_bitcast[UInt8]()
        var up_ = up.unsafe_ptr().unsafe_bitcast[UInt8]()
        var yp = y.unsafe_ptr()
        prepare[form, True](x.unsafe_ptr(), gamma.unsafe_ptr(), number[eps](), xp, M, K)
        # Gate and up of a task's columns, side by side.
        var tasks = parallelism_level(None)
        var per = ceildiv(ceildiv(N, LANES), tasks) * LANES
        var gates = alloc(Layout[Float32](count=M * N))
        var gated = gates.unsafe_ptr()

        def task(t: Int) {var xp, var gp, var up_, var yp, var gated, var M, var K, var N, var per, imm}:
            var first = t * per
            var stop = min(N, first + per)
            var none = xp.unsafe_bitcast[Float32]()
            _columns[form, False](xp, gp, gated, none, 0, M, K, N, first, stop)
            _columns[form, False](xp, up_, yp, none, 0, M, K, N, first, stop)
            for m in range(M):
                var g = gated.unsafe_offset(m * N)
                var u = yp.unsafe_offset(m * N)
                var n = first
                while n + LANES <= stop:
                    u.unsafe_store(n, silu(g.unsafe_load[width=LANES](n)) * u.unsafe_load[width=LANES](n))
                    n += LANES
                while n < stop:
                    # In a vector of 16 as well: exp of a scalar may be another number.
                    u.unsafe_store(n, silu(F(g.unsafe_load(n)))[0] * u.unsafe_load(n))
                    n += 1

        sync_parallelize(task, tasks)
        dealloc(gates^)
        dealloc(scratch^)
