"""The two halves of a decoder layer, each as phases of an operation."""
from .activations import row_bytes
from .attention import Attending
from .formats import is_rows
from .linear import Projections, gated, multiply, number, prepare
from .phases import Bytes, Floats, Phases
from std.math import align_up

comptime _LINE = 64
"""Bytes; an array in scratch memory begins at a multiple of them."""


@always_inline
def _room(size: Int) -> Int:
    """What an array of so many bytes takes."""
    return align_up(size, _LINE)


@always_inline
def _first_line(scratch: Bytes) -> Bytes:
    """Where the first array begins in memory that begins anywhere."""
    return scratch.unsafe_offset(_room(Int(scratch)) - Int(scratch))


struct AttentionHalf[
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
](ImplicitlyCopyable):
    """`y [T, N]` = the residual r + factor * attention(rms_norm(x `[T, K]`)) O^T; see `Attending`.

    Queries, keys and values are the products with three matrices. x is taken as it is where `normed` is 0.
    """

    comptime A = Attending[Self.heads, Self.key_heads, Self.head_dim, Self.interleaved == 1]
    comptime Q = Self.heads * Self.head_dim
    comptime PACKS = not is_rows[Self.form_out]()
    comptime PHASES = 7

    var projections: Projections[Self.form0, Self.form1, Self.form2]
    var a: Self.A
    """Its queries, result and scratch memory are set by `place`."""
    var x: Floats
    var r: Floats
    var gamma: Floats
    var out_proj: Bytes
    var y: Floats
    var N: Int
    var normed_x: Bytes
    var packed: Bytes

    def __init__(
        out self,
        projections: Projections[Self.form0, Self.form1, Self.form2],
        a: Self.A,
        x: Floats,
        r: Floats,
        gamma: Floats,
        out_proj: Bytes,
        y: Floats,
        N: Int,
    ):
        self.projections = projections
        self.a = a
        self.x = x
        self.r = r
        self.gamma = gamma
        self.out_proj = out_proj
        self.y = y
        self.N = N
        self.normed_x = out_proj
        self.packed = out_proj

    def scratch_bytes(self) -> Int:
        """Bytes of scratch memory."""
        var T = self.a.T
        var between = _room(4 * T * Self.A.WIDTH) + _room(4 * T * Self.Q)
        var packed = _room(T * row_bytes[Self.form_out](Self.Q)) if Self.PACKS else 0
        var others = _room(self.projections.scratch_size()) + between + packed
        return _LINE + others + 4 * self.a.scratch_size()

    def place(mut self, scratch: Bytes):
        """Takes scratch memory of `scratch_bytes`."""
        var T = self.a.T
        self.normed_x = _first_line(scratch)
        var free = self.normed_x.unsafe_offset(_room(self.projections.scratch_size()))
        self.a.qkv = free.unsafe_bitcast[Float32]()
        free = free.unsafe_offset(_room(4 * T * Self.A.WIDTH))
        self.a.result = free.unsafe_bitcast[Float32]()
        self.packed = free
        free = free.unsafe_offset(_room(4 * T * Self.Q))
        comptime if Self.PACKS:
            self.packed = free
            free = free.unsafe_offset(_room(T * row_bytes[Self.form_out](Self.Q)))
        self.a.scratch = free.unsafe_bitcast[Float32]()

    @always_inline
    def run(self, p: Phases, phase: Int, task: Int):
        """So many phases as `PHASES` says."""
        var T = self.a.T
        self.projections.run[Self.normed == 1](p, phase, self.x, self.gamma, number[Self.eps](), self.normed_x, self.a.qkv)
        self.a.run(p, phase + 2, task)
        comptime if Self.PACKS:
            prepare[Self.form_out, False](p, phase + 5, self.a.result, self.a.result, 0, self.packed, T, Self.Q)
        multiply[Self.form_out, True](
            p, phase + 6, self.packed, self.out_proj, self.y, self.r, number[Self.factor](), T, Self.Q, self.N
        )


struct MLPHalf[form: StaticString, form_down: StaticString, inner: Int, eps: Int, factor: Int](ImplicitlyCopyable):
    """`y [M, K]` = x `[M, K]` + factor * (silu(z G^T) * (z U^T)) D^T for z = rms_norm(x); G and U have one form.

    y may be x: the last phase reads each number of x once, just before it writes it, and no other one is left to.
    """

    comptime PACKS = not is_rows[Self.form_down]()
    comptime PHASES = 4

    var x: Floats
    var gamma: Floats
    var gate: Bytes
    var up: Bytes
    var down: Bytes
    var y: Floats
    var M: Int
    var K: Int
    var normed: Bytes
    var hidden: Floats
    """`[2, M, I]`."""
    var packed: Bytes

    def __init__(
        out self, x: Floats, gamma: Floats, gate: Bytes, up: Bytes, down: Bytes, y: Floats, M: Int, K: Int
    ):
        self.x = x
        self.gamma = gamma
        self.gate = gate
        self.up = up
        self.down = down
        self.y = y
        self.M = M
        self.K = K
        self.normed = gate
        self.hidden = y
        self.packed = gate

    def scratch_bytes(self) -> Int:
        """Bytes of scratch memory."""
        var packed = _room(self.M * row_bytes[Self.form_down](Self.inner)) if Self.PACKS else 0
        return _LINE + _room(self.M * row_bytes[Self.form](self.K)) + _room(8 * self.M * Self.inner) + packed

    def place(mut self, scratch: Bytes):
        """Takes scratch memory of `scratch_bytes`."""
        self.normed = _first_line(scratch)
        var free = self.normed.unsafe_offset(_room(self.M * row_bytes[Self.form](self.K)))
        self.hidden = free.unsafe_bitcast[Float32]()
        self.packed = free
        comptime if Self.PACKS:
            self.packed = free.unsafe_offset(_room(8 * self.M * Self.inner))

    @always_inline
    def run(self, p: Phases, phase: Int):
        """So many phases as `PHASES` says."""
        comptime I = Self.inner
        var other = self.hidden.unsafe_offset(self.M * I)
        prepare[Self.form, True](p, phase, self.x, self.gamma, number[Self.eps](), self.normed, self.M, self.K)
        gated[Self.form](p, phase + 1, self.normed, self.gate, self.up, self.hidden, other, self.M, self.K, I)
        comptime if Self.PACKS:
            prepare[Self.form_down, False](p, phase + 2, self.hidden, self.hidden, 0, self.packed, self.M, I)
        multiply[Self.form_down, True](
            p, phase + 3, self.packed, self.down, self.y, self.x, number[Self.factor](), self.M, I, self.K
        )
