"""Causal attention over a paged cache: rotates queries and keys, stores keys and values, attends.

Each query row sums in an order of its own, whatever is computed beside it: positions are taken in chunks that
begin at multiples of CHUNK, and the chunks are joined from the first to the last.
"""
from std.collections import Array
from std.math import align_up, ceildiv, exp
from std.sys import CompilationTarget
from std.sys.intrinsics import PrefetchOptions, prefetch

from .formats import F, LANES
from .phases import Floats, Integers, Phases
from .product import rows

comptime CHUNK = 64
"""Positions that are attended to at once; a page has a multiple of them."""
comptime _HIDDEN = Float32.MIN_FINITE
"""Below every score: what the largest one is where a row has seen nothing."""
comptime _BLOCK = 32
"""Most query rows that are attended to at once, heads counted."""
comptime _SUMS = 24 if CompilationTarget.has_avx512f() else 6
"""Vectors of sums that registers have room for; what is summed side by side changes no sum."""


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
def _fetch[D: Int](p: ImmPointer[Float32, _]):
    """Begins to read D numbers that are wanted soon, which a processor does not foresee: other heads lie between.

    Into its second cache, as the first one waits for few numbers at a time.
    """
    comptime for c in range(0, D, LANES):
        prefetch[PrefetchOptions().for_read().medium_locality().to_data_cache()](p.unsafe_offset(c))


@always_inline
def _scores[
    D: Int, STRIDE: Int, TR: Int
](q: ImmPointer[Float32, _], keys: ImmPointer[Float32, _], scores: MutPointer[Float32, _]):
    """Scores of TR query rows and 16 keys."""
    comptime KEYS = LANES // TR
    comptime for n in range(0, LANES, KEYS):
        var found = rows["f32", TR, 1](
            q.unsafe_bitcast[UInt8](), keys.unsafe_offset(n * STRIDE).unsafe_bitcast[UInt8](), 4 * STRIDE, D
        )
        comptime for r in range(TR):
            scores.unsafe_store(r * CHUNK + n, found.slice[KEYS, offset = r * KEYS]())


def _width[D: Int](vectors: Int) -> Int:
    """Columns of a row that are summed at once, in so many vectors at most."""
    comptime for count in [4, 2]:
        if count <= vectors and D % (count * LANES) == 0:
            return count * LANES
    return LANES


@always_inline
def _weigh[
    D: Int, STRIDE: Int, TR: Int
](
    p: ImmPointer[Float32, _],
    limits: ImmPointer[Int32, _],
    first: Int,
    values: ImmPointer[Float32, _],
    ahead: ImmPointer[Float32, _],
    sums: MutPointer[Float32, _],
    num_keys: Int,
):
    """Sums `[TR, D]` of values by weights `[TR, CHUNK]`, each of what its row sees; `ahead` is wanted next."""
    comptime W = _width[D](_SUMS // TR)
    comptime V = SIMD[DType.float32, W]
    var all_see = num_keys
    comptime for r in range(TR):
        all_see = min(all_see, max(0, Int(limits.unsafe_load(r)) - first))
    comptime for c in range(0, D, W):
        var acc = Array[V, TR](fill=0)
        for n in range(all_see):
            var v = values.unsafe_load[width=W](n * STRIDE + c)
            _fetch[W](ahead.unsafe_offset(n * STRIDE + c))
            comptime for r in range(TR):
                acc[r] = v.fma(V(p.unsafe_load(r * CHUNK + n)), acc[r])
        comptime for r in range(TR):
            for n in range(all_see, min(num_keys, Int(limits.unsafe_load(r)) - first)):
                var v = values.unsafe_load[width=W](n * STRIDE + c)
                acc[r] = v.fma(V(p.unsafe_load(r * CHUNK + n)), acc[r])
            sums.unsafe_store(r * D + c, acc[r])


@always_inline
def _attend_chunk[
    D: Int, STRIDE: Int
](
    q: ImmPointer[Float32, _],
    limits: ImmPointer[Int32, _],
    num_rows: Int,
    keys: ImmPointer[Float32, _],
    values: ImmPointer[Float32, _],
    ahead: ImmPointer[Float32, _],
    first: Int,
    num_keys: Int,
    scores: MutPointer[Float32, _],
    sums: MutPointer[Float32, _],
    tops: MutPointer[Float32, _],
    totals: MutPointer[Float32, _],
):
    """Attention of query rows `[R, D]` to positions `first` to `first + num_keys`.

    Row r sees positions below `limits[r]`. `sums` are the weighted sums `[R, D]`, `tops` the largest scores, `totals`
    the sums of weights. There is room for `[R, CHUNK]` in `scores`. The keys `ahead` are those that come next.
    """
    for n in range(0, num_keys, LANES):
        comptime for i in range(LANES):
            _fetch[D](values.unsafe_offset((n + i) * STRIDE))
        var r = 0
        comptime for TR in [4, 2, 1]:
            while r + TR <= num_rows:
                _scores[D, STRIDE, TR](
                    q.unsafe_offset(r * D), keys.unsafe_offset(n * STRIDE), scores.unsafe_offset(r * CHUNK + n)
                )
                r += TR
    var lanes = F(0)
    comptime for c in range(LANES):
        lanes[c] = Float32(c)
    for row in range(num_rows):
        var seen = F(Float32(min(num_keys, Int(limits.unsafe_load(row)) - first)))
        var line = scores.unsafe_offset(row * CHUNK)
        var largest = F(_HIDDEN)
        comptime for n in range(0, CHUNK, LANES):
            var v = line.unsafe_load[width=LANES](n)
            largest = max(largest, (lanes + Float32(n)).lt(seen).select(v, F(_HIDDEN)))
        var top = largest.reduce_max()
        var total = F(0)
        comptime for n in range(0, CHUNK, LANES):
            var p = exp(line.unsafe_load[width=LANES](n) - top)
            p = (lanes + Float32(n)).lt(seen).select(p, F(0))
            line.unsafe_store(n, p)
            total += p
        tops.unsafe_store(row, top)
        totals.unsafe_store(row, total.reduce_add())
    var r = 0
    comptime for TR in [6, 4, 3, 2, 1]:
        while r + TR <= num_rows:
            _weigh[D, STRIDE, TR](
                scores.unsafe_offset(r * CHUNK),
                limits.unsafe_offset(r),
                first,
                values,
                ahead,
                sums.unsafe_offset(r * D),
                num_keys,
            )
            r += TR


@always_inline
def _join[
    D: Int
](
    num_rows: Int,
    sums: ImmPointer[Float32, _],
    tops: ImmPointer[Float32, _],
    totals: ImmPointer[Float32, _],
    into: MutPointer[Float32, _],
    into_tops: MutPointer[Float32, _],
    into_totals: MutPointer[Float32, _],
):
    """Joins a chunk to those before it, each as `_attend_chunk` leaves it."""
    for first in range(0, num_rows, LANES):
        var before = into_tops.unsafe_load[width=LANES](first)
        var top = tops.unsafe_load[width=LANES](first)
        var both = max(before, top)
        # Where nothing is seen the sums are 0, and so is what their factor makes of them.
        var old = exp(before - both)
        var new = exp(top - both)
        into_tops.unsafe_store(first, both)
        var total = into_totals.unsafe_load[width=LANES](first) * old
        into_totals.unsafe_store(first, totals.unsafe_load[width=LANES](first).fma(new, total))
        for r in range(first, min(first + LANES, num_rows)):
            var row = into.unsafe_offset(r * D)
            comptime for c in range(0, D, LANES):
                var s = row.unsafe_load[width=LANES](c) * old[r - first]
                row.unsafe_store(c, sums.unsafe_load[width=LANES](r * D + c).fma(F(new[r - first]), s))


struct _Item(ImplicitlyCopyable):
    """Rows of a sequence with some key heads."""

    var b: Int
    """The sequence."""
    var head: Int
    """The first key head."""
    var start: Int
    """The first row."""
    var count: Int
    """Rows."""
    var position: Int
    """Of the first row in its sequence."""

    def __init__(out self, b: Int, head: Int, start: Int, count: Int, position: Int):
        self.b = b
        self.head = head
        self.start = start
        self.count = count
        self.position = position

    @always_inline
    def length(self) -> Int:
        """Positions that its rows see."""
        return self.position + self.count

    @always_inline
    def num_chunks(self) -> Int:
        """Chunks that its rows see."""
        return ceildiv(self.length(), CHUNK)


struct Attending[heads: Int, key_heads: Int, D: Int, interleaved: Bool](ImplicitlyCopyable):
    """Attention of ragged rows, as three phases of an operation.

    An item is a sequence's rows with all heads, so that keys and values are read in the order in which they lie, or
    where a sequence has too many rows for that, some of them with the query heads of one key head. With few items,
    the chunks of each are computed side by side and joined afterwards.
    """

    comptime G = Self.heads // Self.key_heads
    comptime ROWS = max(1, _BLOCK // Self.G)
    comptime STRIDE = Self.key_heads * Self.D
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
    var rows: Int
    """Most rows of an item."""
    var together: Int
    """Key heads of an item."""
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
        self.qkv = qkv
        self.result = result
        self.rope = rope
        self.offsets = offsets
        self.before = before
        self.table = table
        self.keys = cache.unsafe_offset(layer * page_size * Self.STRIDE)
        self.page_size = page_size
        self.to_values = num_layers * page_size * Self.STRIDE
        self.to_page = page_stride if page_stride >= 0 else 2 * self.to_values
        self.row_pages = row_pages
        self.factor = factor
        self.T = T
        self.B = B
        var row_blocks = 0
        var most = 1
        var longest = 0
        for b in range(B):
            var count = Int(offsets.unsafe_load(b + 1) - offsets.unsafe_load(b))
            row_blocks += ceildiv(count, Self.ROWS)
            most = max(most, count)
            longest = max(longest, Int(before.unsafe_load(b)) + count)
        self.rows = min(most, Self.ROWS)
        self.together = Self.key_heads if most <= Self.ROWS else 1
        self.num_items = row_blocks * Self.key_heads // self.together
        self.chunks = ceildiv(longest, CHUNK)
        self.split = self.num_items < 4 * tasks
        self.tasks = tasks
        self.scratch = qkv

    @always_inline
    def parts(self) -> Int:
        """Pieces of the second phase."""
        return self.num_items * self.chunks if self.split else self.num_items

    @always_inline
    def _sums_size(self) -> Int:
        """Numbers of the sums of an item's rows for one key head."""
        return self.rows * Self.G * Self.D

    @always_inline
    def _tops_size(self) -> Int:
        """Numbers of their largest scores, and of their sums of weights, which lie behind them."""
        return align_up(self.rows * Self.G, LANES)

    @always_inline
    def _part_size(self) -> Int:
        """Numbers that a chunk leaves for one key head."""
        return self._sums_size() + 2 * self._tops_size()

    @always_inline
    def _room_size(self) -> Int:
        """Numbers that a thread needs: states, limits, scores."""
        return self.together * self._part_size() + (1 + CHUNK) * self._tops_size()

    @always_inline
    def _num_parts(self) -> Int:
        """Parts of all pieces, or of all threads where they are joined at once."""
        return (self.parts() if self.split else self.tasks) * self.together

    def scratch_size(self) -> Int:
        """Numbers of scratch memory."""
        var queries = self.T * Self.heads * Self.D
        return queries + self._num_parts() * self._part_size() + self.tasks * self._room_size()

    @always_inline
    def _part(self, index: Int) -> Floats:
        """What a chunk leaves for one key head."""
        return self.scratch.unsafe_offset(self.T * Self.heads * Self.D + index * self._part_size())

    @always_inline
    def _state(self, task: Int, i: Int) -> Floats:
        """What the chunks of a thread's item leave together, for key head i of the item."""
        var room = self._part(self._num_parts()).unsafe_offset(task * self._room_size())
        return room.unsafe_offset(i * self._part_size())

    @always_inline
    def _limits(self, task: Int) -> Integers:
        """What each query row of a thread's item sees."""
        return self._state(task, self.together).unsafe_bitcast[Int32]()

    @always_inline
    def _item(self, index: Int) -> _Item:
        """An item by its number."""
        var groups = Self.key_heads // self.together
        var rest = index // groups
        var b = 0
        while True:
            var begin = Int(self.offsets.unsafe_load(b))
            var end = Int(self.offsets.unsafe_load(b + 1))
            var blocks = ceildiv(end - begin, Self.ROWS)
            if rest < blocks:
                var start = begin + rest * Self.ROWS
                var count = min(Self.ROWS, end - start)
                return _Item(b, index % groups * self.together, start, count, self._position(b, start))
            rest -= blocks
            b += 1

    @always_inline
    def _position(self, b: Int, t: Int) -> Int:
        """Where a row stands in its sequence."""
        return Int(self.before.unsafe_load(b)) + t - Int(self.offsets.unsafe_load(b))

    @always_inline
    def _sequence(self, t: Int) -> Int:
        """Which one a row is of."""
        var b = 0
        while b + 1 < self.B and Int(self.offsets.unsafe_load(b + 1)) <= t:
            b += 1
        return b

    @always_inline
    def _page(self, b: Int, position: Int) -> Floats:
        """Keys of a position."""
        var page = Int(self.table.unsafe_load(b * self.row_pages + position // self.page_size))
        var slot = position % self.page_size
        return self.keys.unsafe_offset(page * self.to_page + slot * Self.STRIDE)

    @always_inline
    def store(self, t: Int):
        """Rotates the queries of a row, and rotates and stores its keys, and its values."""
        var b = self._sequence(t)
        var x = self.qkv.unsafe_offset(t * Self.WIDTH)
        var f = self.rope.unsafe_offset(self._position(b, t) * Self.D)
        comptime for h in range(Self.heads):
            # [key_heads, T, G, D]: the query rows that share keys are neighbours.
            var at = ((h // Self.G) * self.T + t) * Self.G + h % Self.G
            var row = self.scratch.unsafe_offset(at * Self.D)
            _rotate[Self.D, Self.interleaved](x.unsafe_offset(h * Self.D), f, self.factor, row)
        self.store_entry(b, t, x.unsafe_offset(Self.heads * Self.D))

    @always_inline
    def store_entry(self, b: Int, t: Int, x: Floats):
        """Rotates and stores the keys of a row of sequence b, and its values, which lie behind them in x."""
        var position = self._position(b, t)
        var f = self.rope.unsafe_offset(position * Self.D)
        var key = self._page(b, position)
        comptime for h in range(Self.key_heads):
            _rotate[Self.D, Self.interleaved](x.unsafe_offset(h * Self.D), f, 1, key.unsafe_offset(h * Self.D))
        var value = key.unsafe_offset(self.to_values)
        comptime for c in range(0, Self.STRIDE, LANES):
            value.unsafe_store(c, x.unsafe_load[width=LANES](Self.STRIDE + c))

    @always_inline
    def attend(self, item: _Item, chunk: Int, index: Int, task: Int):
        """Attends to one chunk, which leaves its parts from `index` on."""
        var count = item.count * Self.G
        var limits = self._limits(task)
        for r in range(count):
            limits.unsafe_store(r, Int32(item.position + r // Self.G + 1))
        var first = chunk * CHUNK
        var keys = self._page(item.b, first).unsafe_offset(item.head * Self.D)
        # What this thread reads next, where all are as fast.
        var later = first + (self.tasks if self.split else 1) * CHUNK
        var after = keys
        if later < item.length():
            after = self._page(item.b, later).unsafe_offset(item.head * Self.D)
        for i in range(self.together):
            var key = keys.unsafe_offset(i * Self.D)
            var sums = self._part(index + i)
            var tops = sums.unsafe_offset(self._sums_size())
            _attend_chunk[Self.D, Self.STRIDE](
                self.scratch.unsafe_offset(((item.head + i) * self.T + item.start) * Self.G * Self.D),
                limits,
                count,
                key,
                key.unsafe_offset(self.to_values),
                key.unsafe_offset(Self.D) if i + 1 < self.together else after,
                first,
                min(CHUNK, item.length() - first),
                limits.unsafe_offset(self._tops_size()).unsafe_bitcast[Float32](),
                sums,
                tops,
                tops.unsafe_offset(self._tops_size()),
            )

    @always_inline
    def begin(self, task: Int, i: Int):
        """Empties a state."""
        var state = self._state(task, i)
        for at in range(0, self._part_size(), LANES):
            state.unsafe_store(at, F(0))
        for r in range(0, self._tops_size(), LANES):
            state.unsafe_store(self._sums_size() + r, F(_HIDDEN))

    @always_inline
    def join(self, item: _Item, part: Int, task: Int, i: Int):
        """Joins a part to what the chunks before left."""
        var sums = self._part(part)
        var tops = sums.unsafe_offset(self._sums_size())
        var state = self._state(task, i)
        var state_tops = state.unsafe_offset(self._sums_size())
        _join[Self.D](
            item.count * Self.G,
            sums,
            tops,
            tops.unsafe_offset(self._tops_size()),
            state,
            state_tops,
            state_tops.unsafe_offset(self._tops_size()),
        )

    @always_inline
    def finish(self, item: _Item, head: Int, state: Floats):
        """Writes the result of an item for one of its key heads."""
        var totals = state.unsafe_offset(self._sums_size() + self._tops_size())
        for r in range(item.count * Self.G):
            var to = (item.start + r // Self.G) * Self.heads + head * Self.G + r % Self.G
            var row = self.result.unsafe_offset(to * Self.D)
            comptime for c in range(0, Self.D, LANES):
                row.unsafe_store(c, state.unsafe_load[width=LANES](r * Self.D + c) / totals.unsafe_load(r))

    @always_inline
    def share_entries(self, p: Phases, phase: Int, entries: Floats):
        """One phase: `store_entry` of all rows of `[T, 2 * STRIDE]`."""
        var me = self

        def store(t: Int) {var me, var entries, imm}:
            me.store_entry(me._sequence(t), t, entries.unsafe_offset(2 * t * Self.STRIDE))

        p.share(phase, self.T, store)

    @always_inline
    def run(self, p: Phases, phase: Int, task: Int):
        """Three phases."""
        var me = self

        def store(t: Int) {var me, imm}:
            me.store(t)

        p.share(phase, self.T, store)

        def attend(piece: Int) {var me, var task, imm}:
            if me.split:
                var item = me._item(piece // me.chunks)
                if piece % me.chunks < item.num_chunks():
                    me.attend(item, piece % me.chunks, piece * me.together, task)
                return
            var item = me._item(piece)
            for i in range(me.together):
                me.begin(task, i)
            for chunk in range(item.num_chunks()):
                me.attend(item, chunk, task * me.together, task)
                for i in range(me.together):
                    me.join(item, task * me.together + i, task, i)
            for i in range(me.together):
                me.finish(item, item.head + i, me._state(task, i))

        p.share(phase + 1, self.parts(), attend)

        def finish(piece: Int) {var me, var task, imm}:
            var item = me._item(piece // me.together)
            var i = piece % me.together
            me.begin(task, 0)
            for chunk in range(item.num_chunks()):
                me.join(item, (piece // me.together * me.chunks + chunk) * me.together + i, task, 0)
            me.finish(item, item.head + i, me._state(task, 0))

        if self.split:
            p.share(phase + 2, self.num_items * self.together, finish)
