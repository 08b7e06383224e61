"""Causal attention over a paged cache: rotates queries and keys, stores keys and values, attends.

Each query row sums in an order of its own, whatever is computed beside it: positions are taken in chunks that
begin at multiples of CHUNK, and the chunks are joined from the first to the last.
"""
import extensibility
from extensibility import IOSpec, InputTensor, ManagedTensorSlice, OutputTensor
from max.algorithm import sync_parallelize
from max.gpu.host import DeviceContext
from max.runtime.asyncrt import parallelism_level
from std.collections import Array
from std.math import ceildiv, exp
from std.memory import alloc, bitcast, dealloc
from std.memory.alloc import Layout

from .formats import F, LANES

comptime MutableInputTensor = ManagedTensorSlice[IOSpec[_, _].MutableInput, static_spec=_]
comptime CHUNK = 64
"""Positions that are attended to at once."""
comptime _HIDDEN = Float32(-1e30)
"""Score of a position that a row does not see."""
comptime _FEW = 8
"""Rows that one thread rotates and stores faster than several."""
comptime _BLOCK = 32
"""Query rows of a task, heads counted, where there are many."""


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


@extensibility.register("unispec_attention")
struct Attention:
    """Attention of ragged rows, causal.

    `qkv` `[T, (heads + 2 * key_heads) * D]` before rotation, `freqs` `[positions, D]` cosine and sine in turn,
    `blocks` `[pages, 2, layers, page_size, key_heads, D]` with pages `page_stride` numbers apart (negative: one behind the other), `lengths` `[B]`
    tokens of each row before this step, `table` `[B, pages of a row]`; `y` is `[T, heads * D]`.
    """

    @staticmethod
    def execute[
        heads: Int, key_heads: Int, head_dim: Int, scale_bits: Int, interleaved: Int, target: StaticString
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
        comptime D = head_dim
        comptime G = heads // key_heads
        comptime WIDTH = (heads + 2 * key_heads) * D
        var T = qkv.dim_size[0]()
        var B = lengths.dim_size[0]()
        var page_size = blocks.dim_size[3]()
        var num_layers = blocks.dim_size[2]()
        var stride = key_heads * D
        var to_page = Int(page_stride.unsafe_ptr().unsafe_load(0))
        if to_page < 0:
            to_page = 2 * num_layers * page_size * stride
        var to_values = num_layers * page_size * stride
        var cache = blocks.unsafe_ptr().unsafe_offset(Int(layer.unsafe_ptr().unsafe_load(0)) * page_size * stride)
        var x = qkv.unsafe_ptr()
        var result = y.unsafe_ptr()
        var rope = freqs.unsafe_ptr()
        var rows = offsets.unsafe_ptr()
        var before = lengths.unsafe_ptr()
        var pages = table.unsafe_ptr()
        var row_pages = table.dim_size[1]()
        var tasks = parallelism_level(None)
        var factor = bitcast[DType.float32, 1](Int32(scale_bits))

        # [key_heads, T, G, D]: the query rows that share keys are neighbours.
        var scratch = alloc(Layout[Float32](count=T * heads * D))
        var queries = scratch.unsafe_ptr()
        var longest = 0
        var most = 0
        for b in range(B):
            var count = Int(rows.unsafe_load(b + 1)) - Int(rows.unsafe_load(b))
            most = max(most, count)
            longest = max(longest, Int(before.unsafe_load(b)) + count)

        def store(t: Int) {var x, var rope, var cache, var queries, var rows, var before, var pages, var row_pages, var page_size, var to_page, var to_values, var stride, var factor, var B, var T, imm}:
            var b = 0
            while b + 1 < B and Int(rows.unsafe_load(b + 1)) <= t:
                b += 1
            var position = Int(before.unsafe_load(b)) + t - Int(rows.unsafe_load(b))
            var at = x.unsafe_offset(t * WIDTH)
            var f = rope.unsafe_offset(position * D)
            comptime for h in range(heads):
                var row = queries.unsafe_offset((((h // G) * T + t) * G + h % G) * D)
                _rotate[D, interleaved == 1](at.unsafe_offset(h * D), f, factor, row)
            var page = Int(pages.unsafe_load(b * row_pages + position // page_size))
            var key = cache.unsafe_offset(page * to_page + (position % page_size) * stride)
            comptime for h in range(key_heads):
                _rotate[D, interleaved == 1](at.unsafe_offset((heads + h) * D), f, 1, key.unsafe_offset(h * D))
            var value = key.unsafe_offset(to_values)
            comptime for c in range(0, key_heads * D, LANES):
                value.unsafe_store(c, at.unsafe_load[width=LANES]((heads + key_heads) * D + c))

        if T <= _FEW:
            for t in range(T):
                store(t)
        else:
            var per = ceildiv(T, tasks)

            def store_some(task: Int) {var store, var per, var T, imm}:
                for t in range(task * per, min(T, task * per + per)):
                    store(t)

            sync_parallelize(store_some, tasks)

        comptime ROWS = max(1, _BLOCK // G)
        comptime R = ROWS * G
        comptime SLOT = R * (D + 2)
        var row_blocks = ceildiv(most, ROWS)
        var items = B * key_heads * row_blocks
        # With few rows, the chunks of an item are computed side by side and joined afterwards.
        var split = items < 4 * tasks
        var chunks = ceildiv(longest, CHUNK)
        var num_parts = items * chunks if split else tasks
        var states = alloc(Layout[Float32](count=items * SLOT))
        var parts = alloc(Layout[Float32](count=num_parts * SLOT))
        var columns = alloc(Layout[Float32](count=tasks * D * CHUNK))
        var lines = alloc(Layout[Float32](count=tasks * R * CHUNK))
        var bounds = alloc(Layout[Int32](count=tasks * R + num_parts))
        var state = states.unsafe_ptr()
        var part = parts.unsafe_ptr()
        var work = columns.unsafe_ptr()
        var scores = lines.unsafe_ptr()
        var limits = bounds.unsafe_ptr()

        def attend(item: Int, chunk: Int, slot: Int, task: Int) {var queries, var cache, var rows, var before, var pages, var row_pages, var page_size, var to_page, var to_values, var stride, var work, var scores, var limits, var part, var row_blocks, var T, imm} -> Int:
            """Attends to one chunk; the number of query rows, 0 if none of them sees it."""
            var block = item % row_blocks
            var h = item // row_blocks % key_heads
            var b = item // row_blocks // key_heads
            var start = Int(rows.unsafe_load(b)) + block * ROWS
            var stop = min(start + ROWS, Int(rows.unsafe_load(b + 1)))
            var position = Int(before.unsafe_load(b)) + start - Int(rows.unsafe_load(b))
            var first = chunk * CHUNK
            var num_keys = min(CHUNK, position + stop - start - first)
            if stop <= start or num_keys <= 0:
                return 0
            var seen = limits.unsafe_offset(task * R)
            for r in range((stop - start) * G):
                seen.unsafe_store(r, Int32(position + r // G + 1))
            var page = Int(pages.unsafe_load(b * row_pages + first // page_size))
            var keys = cache.unsafe_offset(page * to_page + (first % page_size) * stride + h * D)
            _attend_chunk[D](
                queries.unsafe_offset((h * T + start) * G * D),
                seen,
                (stop - start) * G,
                keys,
                keys.unsafe_offset(to_values),
                stride,
                first,
                num_keys,
                work.unsafe_offset(task * D * CHUNK),
                scores.unsafe_offset(task * R * CHUNK),
                part.unsafe_offset(slot * SLOT),
            )
            return (stop - start) * G

        def join(item: Int, slot: Int, count: Int) {var state, var part, imm}:
            """Joins what `attend` left in a slot to the chunks before."""
            var sums = part.unsafe_offset(slot * SLOT)
            for r in range(count):
                _join[D](
                    sums.unsafe_offset(r * D),
                    sums.unsafe_load(count * D + 2 * r),
                    sums.unsafe_load(count * D + 2 * r + 1),
                    state.unsafe_offset(item * SLOT + r * (D + 2)),
                )

        def begin(item: Int) {var state, imm}:
            for i in range(SLOT):
                state.unsafe_store(item * SLOT + i, 0)

        def finish(item: Int) {var state, var rows, var result, var row_blocks, imm}:
            var block = item % row_blocks
            var h = item // row_blocks % key_heads
            var b = item // row_blocks // key_heads
            var start = Int(rows.unsafe_load(b)) + block * ROWS
            var stop = min(start + ROWS, Int(rows.unsafe_load(b + 1)))
            for r in range((stop - start) * G):
                var sums = state.unsafe_offset(item * SLOT + r * (D + 2))
                var total = sums.unsafe_load(D + 1)
                var row = result.unsafe_offset((start + r // G) * heads * D + (h * G + r % G) * D)
                comptime for c in range(0, D, LANES):
                    row.unsafe_store(c, sums.unsafe_load[width=LANES](c) / total)

        if split:
            var count = items * chunks
            var per = ceildiv(count, tasks)
            var counts = limits.unsafe_offset(tasks * R)

            def attend_some(task: Int) {var attend, var counts, var per, var count, var chunks, imm}:
                for i in range(task * per, min(count, task * per + per)):
                    counts.unsafe_store(i, Int32(attend(i // chunks, i % chunks, i, task)))

            sync_parallelize(attend_some, tasks)

            def join_some(task: Int) {var begin, var join, var finish, var counts, var items, var chunks, var tasks, imm}:
                for item in range(task, items, tasks):
                    begin(item)
                    for c in range(chunks):
                        join(item, item * chunks + c, Int(counts.unsafe_load(item * chunks + c)))
                    finish(item)

            if chunks <= _FEW:
                for task in range(tasks):
                    join_some(task)
            else:
                sync_parallelize(join_some, tasks)
        else:

            def attend_all(task: Int) {var attend, var begin, var join, var finish, var items, var chunks, var tasks, imm}:
                for item in range(task, items, tasks):
                    begin(item)
                    for c in range(chunks):
                        var count = attend(item, c, task, task)
                        if count == 0:
                            break
                        join(item, task, count)
                    finish(item)

            sync_parallelize(attend_all, tasks)
        dealloc(states^)
        dealloc(parts^)
        dealloc(columns^)
        dealloc(lines^)
        dealloc(bounds^)
        dealloc(scratch^)
