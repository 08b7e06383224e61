"""Causal attention over a paged cache: rotates queries and keys, stores keys and values, attends.

Each query row sums in an order of its own, whatever is computed beside it: positions are taken in chunks that
begin at multiples of CHUNK, and the chunks are joined from the first to the last.
"""
from std.collections import Array
from std.math import ceildiv, exp

from .formats import F, LANES
from .phases import Floats, Integers, Phases

comptime CHUNK = 64
"""Positions that are attended to at once; a page has a multiple of them."""
comptime _HIDDEN = Float32(-1e30)
"""Score of a position that a row does not see."""
comptime _BLOCK = 32
"""Query rows of an item, heads counted, where there are many."""


@always_inline
def _rotate[
    D: Int, interleaved: Bool
](x: ImmPointer[Float32, _], freqs: ImmPointer[Float32, _], factor: Float32, y: MutPointer[Float32, _]):
    """Rotates one head; `freqs` has cosine and sine of each pair in turn."""
    comptime H = D // 2
    comptime for i in range(0, H, LANES // 2):
        comptime W = LANES // 2
        var pair = freqs.unsafe_load[width=LANES](2 * i).deinterleave()
        var cos = pair[0]
        var sin = pair[1]
        comptime if interleaved:
            var both = x.unsafe_load[width=LANES](2 * i).deinterleave()
            var re = both[0] * cos - both[1] * sin
            var im = both[0] * sin + both[1] * cos
            y.unsafe_store(2 * i, re.interleave(im) * factor)
        else:
            var a = x.unsafe_load[width=W](i)
            var b = x.unsafe_load[width=W](H + i)
            y.unsafe_store(i, (a * cos - b * sin) * factor)
            y.unsafe_store(H + i, (a * sin + b * cos) * factor)


@always_inline
def _transpose(
    source: ImmPointer[Float32, _], stride: Int, count: Int, into: MutPointer[Float32, _], width: Int
):
    """Writes 16 columns of up to 16 rows as rows that are `width` apart."""
    var v = Array[F, LANES](fill=0)
    comptime for r in range(LANES):
        if r < count:
            v[r] = source.unsafe_load[width=LANES](r * stride)
    comptime for step in range(4):
        var next = Array[F, LANES](fill=0)
        comptime for r in range(LANES // 2):
            var both = v[r].interleave(v[r + LANES // 2])
            next[2 * r] = both.slice[LANES]()
            next[2 * r + 1] = both.slice[LANES, offset=LANES]()
        v = next^
    comptime for c in range(LANES):
        into.unsafe_store(c * width, v[c])


@always_inline
def _scores[
    D: Int, TR: Int
](q: ImmPointer[Float32, _], keys: ImmPointer[Float32, _], scores: MutPointer[Float32, _], num_keys: Int):
    """Scores `[TR, CHUNK]` of TR query rows; `keys` is `[D, CHUNK]`."""
    for n in range(0, num_keys, LANES):
        var even = Array[F, TR](fill=0)
        var odd = Array[F, TR](fill=0)
        for d in range(0, D, 2):
            var a = keys.unsafe_load[width=LANES](d * CHUNK + n)
            var b = keys.unsafe_load[width=LANES]((d + 1) * CHUNK + n)
            comptime for r in range(TR):
                even[r] = a.fma(F(q.unsafe_load(r * D + d)), even[r])
                odd[r] = b.fma(F(q.unsafe_load(r * D + d + 1)), odd[r])
        comptime for r in range(TR):
            scores.unsafe_store(r * CHUNK + n, even[r] + odd[r])


@always_inline
def _weigh[
    D: Int, TR: Int
](
    p: ImmPointer[Float32, _], values: ImmPointer[Float32, _], stride: Int, sums: MutPointer[Float32, _], num_keys: Int
):
    """Sums `[TR, D]` of values by weights `[TR, CHUNK]`."""
    comptime W = 2 * LANES if D % (2 * LANES) == 0 else LANES
    comptime for c in range(0, D, W):
        var acc = Array[SIMD[DType.float32, W], TR](fill=0)
        for n in range(num_keys):
            var v = values.unsafe_load[width=W](n * stride + c)
            comptime for r in range(TR):
                acc[r] = v.fma(SIMD[DType.float32, W](p.unsafe_load(r * CHUNK + n)), acc[r])
        comptime for r in range(TR):
            sums.unsafe_store(r * D + c, acc[r])


@always_inline
def _attend_chunk[
    D: Int
](
    q: ImmPointer[Float32, _],
    limits: ImmPointer[Int32, _],
    num_rows: Int,
    key_page: ImmPointer[Float32, _],
    value_page: ImmPointer[Float32, _],
    stride: Int,
    first: Int,
    num_keys: Int,
    work: MutPointer[Float32, _],
    scores: MutPointer[Float32, _],
    sums: MutPointer[Float32, _],
):
    """Attention of query rows `[R, D]` to positions `first` to `first + num_keys`.

    Row r sees positions below `limits[r]`. `sums` is `[R, D]`, the weighted sums, then `[R, 2]`, the largest
    score and the sum of weights. There is room for `[D, CHUNK]` in `work` and `[R, CHUNK]` in `scores`.
    """
    for n in range(0, num_keys, LANES):
        comptime for c in range(0, D, LANES):
            _transpose(
                key_page.unsafe_offset(n * stride + c), stride, num_keys - n, work.unsafe_offset(c * CHUNK + n), CHUNK
            )
    var r = 0
    while r + 6 <= num_rows:
        _scores[D, 6](q.unsafe_offset(r * D), work, scores.unsafe_offset(r * CHUNK), num_keys)
        r += 6
    while r + 3 <= num_rows:
        _scores[D, 3](q.unsafe_offset(r * D), work, scores.unsafe_offset(r * CHUNK), num_keys)
        r += 3
    while r < num_rows:
        _scores[D, 1](q.unsafe_offset(r * D), work, scores.unsafe_offset(r * CHUNK), num_keys)
        r += 1
    var lanes = F(0)
    comptime for c in range(LANES):
        lanes[c] = Float32(c)
    var padded = ceildiv(num_keys, LANES) * LANES
    for row in range(num_rows):
        var seen = F(limits.unsafe_load(row).cast[DType.float32]() - Float32(first))
        var line = scores.unsafe_offset(row * CHUNK)
        var largest = F(_HIDDEN)
        for n in range(0, padded, LANES):
            var s = (lanes + Float32(n)).lt(seen).select(line.unsafe_load[width=LANES](n), F(_HIDDEN))
            line.unsafe_store(n, s)
            largest = max(largest, s)
        var top = largest.reduce_max()
        var total = F(0)
        for n in range(0, padded, LANES):
            var s = line.unsafe_load[width=LANES](n)
            var p = (s.gt(F(_HIDDEN))).select(exp(s - top), F(0))
            line.unsafe_store(n, p)
            total += p
        sums.unsafe_store(num_rows * D + 2 * row, top)
        sums.unsafe_store(num_rows * D + 2 * row + 1, total.reduce_add())
    r = 0
    while r + 6 <= num_rows:
        _weigh[D, 6](scores.unsafe_offset(r * CHUNK), value_page, stride, sums.unsafe_offset(r * D), num_keys)
        r += 6
    while r + 3 <= num_rows:
        _weigh[D, 3](scores.unsafe_offset(r * CHUNK), value_page, stride, sums.unsafe_offset(r * D), num_keys)
        r += 3
    while r < num_rows:
        _weigh[D, 1](scores.unsafe_offset(r * CHUNK), value_page, stride, sums.unsafe_offset(r * D), num_keys)
        r += 1


@always_inline
def _join[
    D: Int
](sum: ImmPointer[Float32, _], top: Float32, total: Float32, state: MutPointer[Float32, _]):
    """Joins a chunk to those before it; `state` is `[D + 2]`: weighted sum, largest score, sum of weights."""
    if total == 0:
        return
    var before = state.unsafe_load(D)
    var both = max(before, top)
    var old = exp(before - both) if state.unsafe_load(D + 1) > 0 else Float32(0)
    var new = exp(top - both)
    comptime for c in range(0, D, LANES):
        var s = state.unsafe_load[width=LANES](c) * old
        state.unsafe_store(c, sum.unsafe_load[width=LANES](c).fma(F(new), s))
    state.unsafe_store(D, both)
    state.unsafe_store(D + 1, total.fma(new, state.unsafe_load(D + 1) * old))


struct Attending[heads: Int, key_heads: Int, D: Int, interleaved: Bool](ImplicitlyCopyable):
    """Attention of ragged rows, as three phases of an operation.

    An item is some rows of a sequence with all query heads of a key head. With few items, the chunks of
    each are computed side by side and joined afterwards.
    """

    comptime G = Self.heads // Self.key_heads
    comptime ROWS = max(1, _BLOCK // Self.G)
    comptime R = Self.ROWS * Self.G
    comptime SLOT = Self.R * (Self.D + 2)
    comptime WIDTH = (Self.heads + 2 * Self.key_heads) * Self.D

    var qkv: Floats
    """`[T, WIDTH]` before rotation."""
    var result: Floats
    """`[T, heads * D]`."""
    var rope: Floats
    """`[positions, D]`, cosine and sine of each pair in turn."""
    var offsets: Integers
    """`[B + 1]`, where each sequence's rows begin."""
    var before: Integers
    """`[B]`, tokens of each sequence that are cached."""
    var table: Integers
    """`[B, row_pages]`."""
    var keys: Floats
    """Of this layer, on page 0."""
    var page_size: Int
    var to_page: Int
    """Numbers from a page to the next one, and below from keys to their values."""
    var to_values: Int
    var row_pages: Int
    var factor: Float32
    """Of the scores."""
    var T: Int
    var B: Int
    var row_blocks: Int
    var chunks: Int
    var split: Bool
    var scratch: Floats

    def __init__(
        out self,
        qkv: Floats,
        result: Floats,
        rope: Floats,
        offsets: Integers,
        before: Integers,
        table: Integers,
        cache: Floats,
        layer: Int,
        num_layers: Int,
        page_size: Int,
        page_stride: Int,
        row_pages: Int,
        factor: Float32,
        T: Int,
        B: Int,
        tasks: Int,
    ):
        """The scratch memory of `scratch_size` is to be set."""
        comptime stride = Self.key_heads * Self.D
        self.qkv = qkv
        self.result = result
        self.rope = rope
        self.offsets = offsets
        self.before = before
        self.table = table
        self.keys = cache.unsafe_offset(layer * page_size * stride)
        self.page_size = page_size
        self.to_values = num_layers * page_size * stride
        self.to_page = page_stride if page_stride >= 0 else 2 * self.to_values
        self.row_pages = row_pages
        self.factor = factor
        self.T = T
        self.B = B
        var most = 0
        var longest = 0
        for b in range(B):
            var count = Int(offsets.unsafe_load(b + 1) - offsets.unsafe_load(b))
            most = max(most, count)
            longest = max(longest, Int(before.unsafe_load(b)) + count)
        self.row_blocks = ceildiv(most, Self.ROWS)
        self.chunks = ceildiv(longest, CHUNK)
        self.split = B * Self.key_heads * self.row_blocks < 4 * tasks
        self.scratch = qkv

    @always_inline
    def items(self) -> Int:
        return self.B * Self.key_heads * self.row_blocks

    @always_inline
    def parts(self) -> Int:
        """Pieces of the second phase."""
        return self.items() * self.chunks if self.split else self.items()

    @always_inline
    def _room(self) -> Int:
        """Numbers that a piece needs beside its result: keys by columns, scores, limits."""
        return Self.D * CHUNK + Self.R * CHUNK + Self.R

    def scratch_size(self) -> Int:
        """Numbers of scratch memory."""
        var queries = self.T * Self.heads * Self.D
        return queries + self.items() * Self.SLOT + self.parts() * (Self.SLOT + self._room() + 1)

    @always_inline
    def _state(self, item: Int) -> Floats:
        return self.scratch.unsafe_offset(self.T * Self.heads * Self.D + item * Self.SLOT)

    @always_inline
    def _part(self, piece: Int) -> Floats:
        """Sums, then room, then the number of query rows."""
        var size = Self.SLOT + self._room() + 1
        return self.scratch.unsafe_offset(self.T * Self.heads * Self.D + self.items() * Self.SLOT + piece * size)

    @always_inline
    def _page(self, b: Int, position: Int) -> Floats:
        """Keys of a position."""
        var page = Int(self.table.unsafe_load(b * self.row_pages + position // self.page_size))
        var slot = position % self.page_size
        return self.keys.unsafe_offset(page * self.to_page + slot * Self.key_heads * Self.D)

    @always_inline
    def store(self, t: Int):
        """Rotates the queries of a row, and rotates and stores its keys, and its values."""
        var b = 0
        while b + 1 < self.B and Int(self.offsets.unsafe_load(b + 1)) <= t:
            b += 1
        var position = Int(self.before.unsafe_load(b)) + t - Int(self.offsets.unsafe_load(b))
        var x = self.qkv.unsafe_offset(t * Self.WIDTH)
        var f = self.rope.unsafe_offset(position * Self.D)
        comptime for h in range(Self.heads):
            # [key_heads, T, G, D]: the query rows that share keys are neighbours.
            var at = ((h // Self.G) * self.T + t) * Self.G + h % Self.G
            var row = self.scratch.unsafe_offset(at * Self.D)
            _rotate[Self.D, Self.interleaved](x.unsafe_offset(h * Self.D), f, self.factor, row)
        var key = self._page(b, position)
        comptime for h in range(Self.key_heads):
            var from_head = x.unsafe_offset((Self.heads + h) * Self.D)
            _rotate[Self.D, Self.interleaved](from_head, f, 1, key.unsafe_offset(h * Self.D))
        var value = key.unsafe_offset(self.to_values)
        comptime for c in range(0, Self.key_heads * Self.D, LANES):
            value.unsafe_store(c, x.unsafe_load[width=LANES]((Self.heads + Self.key_heads) * Self.D + c))

    @always_inline
    def attend(self, item: Int, chunk: Int, piece: Int) -> Int:
        """Attends to one chunk; the number of query rows, 0 if none of them sees it."""
        var block = item % self.row_blocks
        var h = item // self.row_blocks % Self.key_heads
        var b = item // self.row_blocks // Self.key_heads
        var begin = Int(self.offsets.unsafe_load(b))
        var start = begin + block * Self.ROWS
        var stop = min(start + Self.ROWS, Int(self.offsets.unsafe_load(b + 1)))
        var position = Int(self.before.unsafe_load(b)) + start - begin
        var first = chunk * CHUNK
        var num_keys = min(CHUNK, position + stop - start - first)
        if stop <= start or num_keys <= 0:
            return 0
        var count = (stop - start) * Self.G
        var sums = self._part(piece)
        var work = sums.unsafe_offset(Self.SLOT)
        var scores = work.unsafe_offset(Self.D * CHUNK)
        var limits = scores.unsafe_offset(Self.R * CHUNK).unsafe_bitcast[Int32]()
        for r in range(count):
            limits.unsafe_store(r, Int32(position + r // Self.G + 1))
        var keys = self._page(b, first).unsafe_offset(h * Self.D)
        _attend_chunk[Self.D](
            self.scratch.unsafe_offset((h * self.T + start) * Self.G * Self.D),
            limits,
            count,
            keys,
            keys.unsafe_offset(self.to_values),
            Self.key_heads * Self.D,
            first,
            num_keys,
            work,
            scores,
            sums,
        )
        return count

    @always_inline
    def join(self, item: Int, piece: Int, count: Int):
        """Joins what `attend` left to the chunks before."""
        var sums = self._part(piece)
        for r in range(count):
            _join[Self.D](
                sums.unsafe_offset(r * Self.D),
                sums.unsafe_load(count * Self.D + 2 * r),
                sums.unsafe_load(count * Self.D + 2 * r + 1),
                self._state(item).unsafe_offset(r * (Self.D + 2)),
            )

    @always_inline
    def begin(self, item: Int):
        for i in range(Self.SLOT):
            self._state(item).unsafe_store(i, 0)

    @always_inline
    def finish(self, item: Int):
        """Writes the result of an item."""
        var block = item % self.row_blocks
        var h = item // self.row_blocks % Self.key_heads
        var b = item // self.row_blocks // Self.key_heads
        var start = Int(self.offsets.unsafe_load(b)) + block * Self.ROWS
        var stop = min(start + Self.ROWS, Int(self.offsets.unsafe_load(b + 1)))
        for r in range((stop - start) * Self.G):
            var sums = self._state(item).unsafe_offset(r * (Self.D + 2))
            var total = sums.unsafe_load(Self.D + 1)
            var head = (start + r // Self.G) * Self.heads + h * Self.G + r % Self.G
            var row = self.result.unsafe_offset(head * Self.D)
            comptime for c in range(0, Self.D, LANES):
                row.unsafe_store(c, sums.unsafe_load[width=LANES](c) / total)

    @always_inline
    def run(self, p: Phases, phase: Int):
        """Three phases."""
        var me = self
        comptime LAST = Self.SLOT + Self.D * CHUNK + Self.R * CHUNK + Self.R

        def store(t: Int) {var me, imm}:
            me.store(t)

        p.share(phase, self.T, store)

        def attend(piece: Int) {var me, imm}:
            if me.split:
                var count = me.attend(piece // me.chunks, piece % me.chunks, piece)
                me._part(piece).unsafe_bitcast[Int32]().unsafe_store(LAST, Int32(count))
                return
            me.begin(piece)
            for chunk in range(me.chunks):
                var count = me.attend(piece, chunk, piece)
                if count == 0:
                    break
                me.join(piece, piece, count)
            me.finish(piece)

        p.share(phase + 1, self.parts(), attend)

        def finish(item: Int) {var me, imm}:
            me.begin(item)
            for chunk in range(me.chunks):
                var piece = item * me.chunks + chunk
                me.join(item, piece, Int(me._part(piece).unsafe_bitcast[Int32]().unsafe_load(LAST)))
            me.finish(item)

        if self.split:
            p.share(phase + 2, self.items(), finish)
