"""Products x W^T for few rows of x and for many, as phases of an operation."""
from std.math import ceildiv, exp
from std.memory import bitcast

from .activations import row_bytes, write_row
from .formats import F, LANES, is_rows, unit_bytes
from .phases import Bytes, Floats, Phases
from .product import blocks, row, rows

comptime _STREAMS = 4
"""Units that are read side by side for one row of x."""
comptime _PIECES = 2
"""Pieces of a product for each thread, so that one that is held up leaves some to the others."""


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
def columns[
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


@always_inline
def piece_columns(N: Int, tasks: Int) -> Int:
    """Columns of a piece, whole streams of units."""
    return ceildiv(ceildiv(N, LANES), _PIECES * _STREAMS * tasks) * _STREAMS * LANES


@always_inline
def prepare[
    form: StaticString, normed: Bool
](p: Phases, phase: Int, x: Floats, gamma: Floats, eps: Float32, into: Bytes, M: Int, K: Int):
    """Writes the rows of x as a product reads them."""
    var size = row_bytes[form](K)

    def one(m: Int) {var x, var gamma, var eps, var into, var K, var size, imm}:
        write_row[form, normed](x.unsafe_offset(m * K), gamma, eps, into.unsafe_offset(m * size), K)

    p.share(phase, M, one)


@always_inline
def multiply[
    form: StaticString, add: Bool
](
    p: Phases,
    phase: Int,
    x: Bytes,
    w: Bytes,
    y: Floats,
    r: Floats,
    factor: Float32,
    M: Int,
    K: Int,
    N: Int,
):
    """Writes the product to y `[M, N]`, `r + factor *` the product where something is added to."""
    var size = piece_columns(N, p.tasks)

    def piece(i: Int) {var x, var w, var y, var r, var factor, var M, var K, var N, var size, imm}:
        columns[form, add](x, w, y, r, factor, M, K, N, i * size, min(N, i * size + size))

    p.share(phase, ceildiv(N, size), piece)


struct Projections[form0: StaticString, form1: StaticString, form2: StaticString](ImplicitlyCopyable):
    """Three products with the same rows of x, side by side in y; the first two matrices are whole units."""

    comptime at1 = 0 if Self.form1 == Self.form0 else 1
    comptime at2 = 0 if Self.form2 == Self.form0 else (Self.at1 if Self.form2 == Self.form1 else Self.at1 + 1)
    """Which prepared rows a matrix reads: those of the first one in the same form."""

    var w0: Bytes
    var w1: Bytes
    var w2: Bytes
    var n0: Int
    var n1: Int
    var M: Int
    var K: Int
    var N: Int

    def __init__(out self, w0: Bytes, w1: Bytes, w2: Bytes, stored0: Int, stored1: Int, M: Int, K: Int, N: Int):
        """`stored0` and `stored1` are rows of the stored arrays."""
        self.w0 = w0
        self.w1 = w1
        self.w2 = w2
        self.n0 = stored0 * (1 if is_rows[Self.form0]() else LANES)
        self.n1 = self.n0 + stored1 * (1 if is_rows[Self.form1]() else LANES)
        self.M = M
        self.K = K
        self.N = N

    @always_inline
    def rows_size(self) -> Int:
        """Bytes of the rows of x in one form."""
        return self.M * max(
            row_bytes[Self.form0](self.K), max(row_bytes[Self.form1](self.K), row_bytes[Self.form2](self.K))
        )

    @always_inline
    def scratch_size(self) -> Int:
        """Bytes of the rows of x in all forms."""
        return (1 + max(Self.at1, Self.at2)) * self.rows_size()

    @always_inline
    def run[
        normed: Bool
    ](self, p: Phases, phase: Int, x: Floats, gamma: Floats, eps: Float32, scratch: Bytes, y: Floats):
        """Two phases."""
        var me = self
        var size = self.rows_size()

        def one(m: Int) {var me, var x, var gamma, var eps, var scratch, var size, imm}:
            var K = me.K
            var row = x.unsafe_offset(m * K)
            write_row[Self.form0, normed](row, gamma, eps, scratch.unsafe_offset(m * row_bytes[Self.form0](K)), K)
            comptime if Self.at1 == 1:
                var into = scratch.unsafe_offset(size + m * row_bytes[Self.form1](K))
                write_row[Self.form1, normed](row, gamma, eps, into, K)
            comptime if Self.at2 > Self.at1:
                var into = scratch.unsafe_offset(Self.at2 * size + m * row_bytes[Self.form2](K))
                write_row[Self.form2, normed](row, gamma, eps, into, K)

        p.share(phase, self.M, one)
        var width = piece_columns(self.N, p.tasks)

        def piece(i: Int) {var me, var scratch, var y, var size, var width, imm}:
            var first = i * width
            var stop = min(me.N, first + width)
            var none = scratch.unsafe_bitcast[Float32]()
            columns[Self.form0, False](scratch, me.w0, y, none, 0, me.M, me.K, me.N, first, min(stop, me.n0))
            var x1 = scratch.unsafe_offset(Self.at1 * size)
            var y1 = y.unsafe_offset(me.n0)
            columns[Self.form1, False](
                x1, me.w1, y1, none, 0, me.M, me.K, me.N, max(first - me.n0, 0), min(stop, me.n1) - me.n0
            )
            var x2 = scratch.unsafe_offset(Self.at2 * size)
            var y2 = y.unsafe_offset(me.n1)
            columns[Self.form2, False](
                x2, me.w2, y2, none, 0, me.M, me.K, me.N, max(first - me.n1, 0), stop - me.n1
            )

        p.share(phase + 1, ceildiv(self.N, width), piece)


@always_inline
def gated[
    form: StaticString
](
    p: Phases, phase: Int, x: Bytes, gate: Bytes, up: Bytes, y: Floats, other: Floats, M: Int, K: Int, N: Int
):
    """Writes silu(gate) * up to y `[M, N]`; `other` has room for as much."""
    var size = piece_columns(N, p.tasks)

    def piece(i: Int) {var x, var gate, var up, var y, var other, var M, var K, var N, var size, imm}:
        var first = i * size
        var stop = min(N, first + size)
        columns[form, False](x, gate, other, other, 0, M, K, N, first, stop)
        columns[form, False](x, up, y, other, 0, M, K, N, first, stop)
        for m in range(M):
            var g = other.unsafe_offset(m * N)
            var u = y.unsafe_offset(m * N)
            var n = first
            while n + LANES <= stop:
                u.unsafe_store(n, silu(g.unsafe_load[width=LANES](n)) * u.unsafe_load[width=LANES](n))
                n += LANES
            while n < stop:
                # In a vector of 16 as well: the exponential of a scalar may be another number.
                u.unsafe_store(n, silu(F(g.unsafe_load(n)))[0] * u.unsafe_load(n))
                n += 1

    p.share(phase, ceildiv(N, size), piece)
