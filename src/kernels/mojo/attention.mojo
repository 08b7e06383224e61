"""Causal attention over a paged cache: rotates queries and keys, stores keys and values, attends.

Each query row sums in an order of its own, whatever is computed beside it: positions are taken in chunks that
begin at multiples of CHUNK, and the chunks are joined from the first to the last.
"""
from std.collections import Array
from std.math import align_up, ceildiv, exp

from .formats import F, LANES
from .phases import Floats, Integers, Phases

comptime CHUNK = 64
"""Positions that are attended to at once; a page has a multiple of them."""
comptime _HIDDEN = Float32.MIN_FINITE
"""Below every score: what the largest one is where a row has seen nothing."""
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
    p: ImmPointer[Float32, _],
    limits: ImmPointer[Int32, _],
    first: Int,
    values: ImmPointer[Float32, _],
    stride: Int,
    sums: MutPointer[Float32, _],
    num_keys: Int,
):
    """Sums `[TR, D]` of values by weights `[TR, CHUNK]`, each of what its row sees."""
    comptime W = 2 * LANES if D % (2 * LANES) == 0 else LANES
    var all_see = num_keys
    comptime for r in range(TR):
        all_see = min(all_see, max(0, Int(limits.unsafe_load(r)) - first))
    comptime for c in range(0, D, W):
        var acc = Array[SIMD[DType.float32, W], TR](fill=0)
        for n in range(all_see):
            var v = values.unsafe_load[width=W](n * stride + c)
            comptime for r in range(TR):
                acc[r] = v.fma(SIMD[DType.float32, W](p.unsafe_load(r * CHUNK + n)), acc[r])
        comptime for r in range(TR):
            for n in range(all_see, min(num_keys, Int(limits.unsafe_load(r)) - first)):
                var v = values.unsafe_load[width=W](n * stride + c)
                acc[r] = v.fma(SIMD[DType.float32, W](p.unsafe_load(r * CHUNK + n)), acc[r])
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
    for row in range(num_rows):
        var seen = min(num_keys, Int(limits.unsafe_load(row)) - first)
        var line = scores.unsafe_offset(row * CHUNK)
        var largest = F(_HIDDEN)
        for n in range(0, seen, LANES):
            var is_seen = (lanes + Float32(n)).lt(F(Float32(seen)))
            largest = max(largest, is_seen.select(line.unsafe_load[width=LANES](n), F(_HIDDEN)))
        var top = largest.reduce_max()
        var total = F(0)
        for n in range(0, seen, LANES):
            var is_seen = (lanes + Float32(n)).lt(F(Float32(seen)))
            var p = is_seen.select(exp(line.unsafe_load[width=LANES](n) - top), F(0))
            line.unsafe_store(n, p)
            total += p
        sums.unsafe_store(num_rows * D + 2 * row, top)
        sums.unsafe_store(num_rows * D + 2 * row + 1, total.reduce_add())
    r = 0
    while r + 6 <= num_rows:
        _weigh[D, 6](
            scores.unsafe_offset(r * CHUNK), limits.unsafe_offset(r), first, value_page, stride, sums.unsafe_offset(r * D), num_keys
        )
        r += 6
    while r + 3 <= num_rows:
        _weigh[D, 3](
            scores.unsafe_offset(r * CHUNK), limits.unsafe_offset(r), first, value_page, stride, sums.unsafe_offset(r * D), num_keys
        )
        r += 3
    while r < num_rows:
        _weigh[D, 1](
            scores.unsafe_offset(r * CHUNK), limits.unsafe_offset(r), first, value_page, stride, sums.unsafe_offset(r * D), num_keys
        )
        r += 1


@always_inline
def _join[
    D: Int
](sum: ImmPointer[Float32, _], top: Float32, total: Float32, state: MutPointer[Float32, _]):
    """Joins a chunk to those before it; `state` is `[D + 2]`: weighted sum, largest score, sum of weights."""
    if top == _HIDDEN:
        return
    var before = state.unsafe_load(D)
    var both = max(before, top)
    var old = exp(before - both) if before > _HIDDEN else Float32(0)
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
    var num_items: Int
    """Of all sequences."""
    var chunks: Int
    """Of the longest one."""
    var split: Bool
    var tasks: Int
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
        var row_blocks = 0
        var longest = 0
        for b in range(B):
            var count = Int(offsets.unsafe_load(b + 1) - offsets.unsafe_load(b))
            row_blocks += ceildiv(count, Self.ROWS)
            longest = max(longest, Int(before.unsafe_load(b)) + count)
        self.num_items = row_blocks * Self.key_heads
        self.chunks = ceildiv(longest, CHUNK)
        self.split = self.num_items < 4 * tasks
        self.tasks = tasks
        self.scratch = qkv

    @always_inline
    def parts(self) -> Int:
        """Pieces of the second phase."""
        return self.num_items * self.chunks if self.split else self.num_items

    comptime PART = align_up(Self.R * (Self.D + 2) + 1, LANES)
    """Numbers that a chunk leaves: sums, largest score and sum of weights of each row; how many rows."""
    comptime ROOM = (Self.D + Self.R) * CHUNK + align_up(Self.R * (Self.D + 3), LANES)
    """Numbers that a thread needs: keys by columns, scores, states, limits."""
    comptime STATES = (Self.D + Self.R) * CHUNK

    def scratch_size(self) -> Int:
        """Numbers of scratch memory."""
        var parts = self.parts() if self.split else self.tasks
        return self.T * Self.heads * Self.D + parts * Self.PART + self.tasks * Self.ROOM

    @always_inline
    def _part(self, index: Int) -> Floats:
        """What a chunk leaves: of each piece, or of each thread where they are joined at once."""
        return self.scratch.unsafe_offset(self.T * Self.heads * Self.D + index * Self.PART)

    @always_inline
    def _room(self, task: Int) -> Floats:
        """A thread's."""
        var parts = self.parts() if self.split else self.tasks
        return self._part(parts).unsafe_offset(task * Self.ROOM)

    @always_inline
    def _states(self, task: Int) -> Floats:
        """Of the rows of a thread's item."""
        return self._room(task).unsafe_offset(Self.STATES)

    @always_inline
    def _item(self, item: Int) -> Tuple[Int, Int, Int, Int]:
        """Sequence, key head and rows from start to stop of an item."""
        var rest = item // Self.key_heads
        var b = 0
        while True:
            var begin = Int(self.offsets.unsafe_load(b))
            var end = Int(self.offsets.unsafe_load(b + 1))
            var count = ceildiv(end - begin, Self.ROWS)
            if rest < count:
                var start = begin + rest * Self.ROWS
                return b, item % Self.key_heads, start, min(start + Self.ROWS, end)
            rest -= count
            b += 1

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
    def attend(self, item: Int, chunk: Int, index: Int, task: Int) -> Int:
        """Attends to one chunk; the number of query rows, 0 if none of them sees it."""
        var found = self._item(item)
        var b = found[0]
        var h = found[1]
        var start = found[2]
        var stop = found[3]
        var position = Int(self.before.unsafe_load(b)) + start - Int(self.offsets.unsafe_load(b))
        var first = chunk * CHUNK
        var num_keys = min(CHUNK, position + stop - start - first)
        if num_keys <= 0:
            return 0
        var count = (stop - start) * Self.G
        var work = self._room(task)
        var scores = work.unsafe_offset(Self.D * CHUNK)
        var limits = self._states(task).unsafe_offset(Self.R * (Self.D + 2)).unsafe_bitcast[Int32]()
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
            self._part(index),
        )
        return count

    @always_inline
    def join(self, index: Int, count: Int, task: Int):
        """Joins what `attend` left to the chunks before."""
        var sums = self._part(index)
        var state = self._states(task)
        for r in range(count):
            _join[Self.D](
                sums.unsafe_offset(r * Self.D),
                sums.unsafe_load(count * Self.D + 2 * r),
                sums.unsafe_load(count * Self.D + 2 * r + 1),
                state.unsafe_offset(r * (Self.D + 2)),
            )

    @always_inline
    def begin(self, task: Int):
        """Empties a thread's states."""
        var state = self._states(task)
        for i in range(Self.R * (Self.D + 2)):
            state.unsafe_store(i, 0)
        for r in range(Self.R):
            state.unsafe_store(r * (Self.D + 2) + Self.D, _HIDDEN)

    @always_inline
    def finish(self, item: Int, task: Int):
        """Writes the result of an item."""
        var found = self._item(item)
        var start = found[2]
        var state = self._states(task)
        for r in range((found[3] - start) * Self.G):
            var sums = state.unsafe_offset(r * (Self.D + 2))
            var total = sums.unsafe_load(Self.D + 1)
            var head = (start + r // Self.G) * Self.heads + found[1] * Self.G + r % Self.G
            var row = self.result.unsafe_offset(head * Self.D)
            comptime for c in range(0, Self.D, LANES):
                row.unsafe_store(c, sums.unsafe_load[width=LANES](c) / total)

    @always_inline
    def run(self, p: Phases, phase: Int, task: Int):
        """Three phases."""
        var me = self
        comptime LAST = Self.PART - 1

        def store(t: Int) {var me, imm}:
            me.store(t)

        p.share(phase, self.T, store)

        def attend(piece: Int) {var me, var task, imm}:
            if me.split:
                var count = me.attend(piece // me.chunks, piece % me.chunks, piece, task)
                me._part(piece).unsafe_bitcast[Int32]().unsafe_store(LAST, Int32(count))
                return
            me.begin(task)
            for chunk in range(me.chunks):
                var count = me.attend(piece, chunk, task, task)
                if count == 0:
                    break
                me.join(task, count, task)
            me.finish(piece, task)

        p.share(phase + 1, self.parts(), attend)

        def finish(item: Int) {var me, var task, imm}:
            me.begin(task)
            for chunk in range(me.chunks):
                var piece = item * me.chunks + chunk
                me.join(piece, Int(me._part(piece).unsafe_bitcast[Int32]().unsafe_load(LAST)), task)
            me.finish(item, task)

        if self.split:
            p.share(phase + 2, self.num_items, finish)
