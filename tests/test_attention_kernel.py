"""Our attention on a CPU against numpy, over a paged cache with ragged rows."""

from __future__ import annotations

from collections.abc import Sequence
from copy import copy
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import pytest
from max.driver import CPU, Buffer
from max.dtype import DType
from max.engine import InferenceSession, Model
from max.graph import BufferType, DeviceRef, Graph, TensorType
from max.nn.kv_cache import KVCacheInputsPerDevice

from unispec.kernels.library import kernels_for
from unispec.kernels.operations import Attending, attention


class Shape(NamedTuple):
    """Of the heads."""

    heads: int = 6
    key_heads: int = 2
    width: int = 32

    @property
    def columns(self) -> int:
        """Queries, keys and values of a row."""
        return (self.heads + 2 * self.key_heads) * self.width

    @property
    def page(self) -> tuple[int, ...]:
        """Of the cache."""
        return (2, LAYERS, PAGE_SIZE, self.key_heads, self.width)

    @property
    def angles(self) -> npt.NDArray[np.float64]:
        """Of each position and pair."""
        speeds = THETA ** (-np.arange(0, self.width, 2) / self.width)
        return np.arange(POSITIONS)[:, None] * speeds


SHAPE = Shape()
HEADS, KEY_HEADS, WIDTH = SHAPE
# 1, 3, 4 and 8 query heads for a key head; sums take 16 or 64 columns of a head at a time.
SHAPES = (Shape(3, 3, 48), Shape(9, 3, 64), Shape(8, 2, 64), Shape(8, 1, 128))
PAGES, LAYERS, LAYER, PAGE_SIZE = 24, 2, 1, 128
SCALE, THETA, POSITIONS = 0.3, 10_000.0, 1024
pytestmark = pytest.mark.compiles("attention_kernel")

CPU_REF = DeviceRef.CPU()
# Of float32 numbers near 1, of which some hundred are summed.
TOLERANCE = 2e-6

Floats = npt.NDArray[np.float32]


@pytest.fixture(scope="module")
def models() -> dict[bool, Model]:
    """By whether the two numbers that rotate together are neighbours."""
    return {
        interleaved: compile_attention([SHAPE], interleaved=interleaved)
        for interleaved in (False, True)
    }


@pytest.fixture(scope="module")
def grouped() -> Model:
    """Attention of each of `SHAPES`."""
    return compile_attention(SHAPES, interleaved=False)


def compile_attention(shapes: Sequence[Shape], *, interleaved: bool) -> Model:
    """Takes a cache for each shape, what all of them read, and for each its rows and angles."""
    types = [
        *[BufferType(DType.float32, ["pages", *shape.page], CPU_REF) for shape in shapes],
        TensorType(DType.uint32, ["offsets"], CPU_REF),
        TensorType(DType.int64, [1], CPU_REF),
        TensorType(DType.uint32, ["b"], CPU_REF),
        TensorType(DType.uint32, ["b", "row_pages"], CPU_REF),
        TensorType(DType.uint32, [], CPU_REF),
    ]
    for shape in shapes:
        types.append(TensorType(DType.float32, ["t", shape.columns], CPU_REF))
        types.append(TensorType(DType.float32, [POSITIONS, shape.width], CPU_REF))
    name = f"attention_{interleaved}_{len(shapes)}"
    with kernels_for(CPU_REF), Graph(name, input_types=types) as graph:
        caches = [value.buffer for value in graph.inputs[: len(shapes)]]
        offsets, stride, lengths, table, layer, *others = [
            value.tensor for value in graph.inputs[len(shapes) :]
        ]
        found = []
        for shape, blocks in zip(shapes, caches, strict=True):
            cache = KVCacheInputsPerDevice(
                kv_blocks=blocks,
                cache_lengths=lengths,
                lookup_table=table,
                max_prompt_length=lengths,
                max_cache_length=lengths,
                page_stride=stride,
            )
            qkv, freqs = others.pop(0), others.pop(0)
            attending = Attending(offsets, freqs, cache, layer, *shape, SCALE, interleaved)
            found.append(attention(qkv, attending))
        graph.output(*found)
    return InferenceSession(devices=[CPU()]).load(graph)


def run_all(
    model: Model, batches: Sequence[Batch], *, stride: int = -1
) -> list[tuple[Floats, Floats]]:
    """What is put out for each, and the cache after it; they differ in their shape only."""
    caches = [Buffer.from_numpy(batch.cache.copy()) for batch in batches]
    one = batches[0]
    arrays: list[npt.NDArray[np.generic]] = [
        one.offsets.astype(np.uint32),
        np.array([stride], np.int64),
        np.array(one.lengths, np.uint32),
        one.table.astype(np.uint32),
        np.array(LAYER, np.uint32),
    ]
    for batch in batches:
        angles = batch.shape.angles
        turns = np.stack([np.cos(angles), np.sin(angles)], axis=-1)
        arrays += [batch.qkv, turns.reshape(POSITIONS, -1).astype(np.float32)]
    outputs = model.execute(*caches, *map(Buffer.from_numpy, arrays))
    return [
        (np.array(found.to_numpy()), np.array(cache.to_numpy()))
        for found, cache in zip(outputs, caches, strict=True)
    ]


class Batch:
    """Rows of some length, each with some new tokens, in random pages."""

    def __init__(
        self,
        lengths: Sequence[int],
        counts: Sequence[int],
        *,
        shape: Shape = SHAPE,
        seed: int = 0,
    ) -> None:
        random = np.random.default_rng(seed)
        self.shape = shape
        self.lengths, self.counts = list(lengths), list(counts)
        pages = max(
            -(-(before + new) // PAGE_SIZE) for before, new in zip(lengths, counts, strict=True)
        )
        self.table = random.permutation(PAGES)[: len(lengths) * pages].reshape(len(lengths), pages)
        self.cache = random.standard_normal((PAGES, *shape.page), dtype=np.float32)
        self.offsets = np.concatenate([[0], np.cumsum(counts)])
        self.qkv = random.standard_normal((sum(counts), shape.columns), dtype=np.float32)

    def run(self, model: Model, *, stride: int = -1) -> tuple[Floats, Floats]:
        """What is put out, and the cache after it."""
        (found,) = run_all(model, [self], stride=stride)
        return found

    def rows(self, start: int, count: int, cache: Floats) -> Batch:
        """Some rows of its first sequence, after those before have been written to that cache."""
        part = copy(self)
        part.lengths, part.counts = [self.lengths[0] + start], [count]
        part.offsets, part.table, part.cache = np.array([0, count]), self.table[:1], cache
        part.qkv = self.qkv[start : start + count]
        return part

    def expected(self, interleaved: bool) -> tuple[npt.NDArray[np.float64], Floats]:
        cache = self.cache.copy()
        num_heads, key_heads, width = self.shape
        found = np.zeros((sum(self.counts), num_heads, width))
        for row, (before, count) in enumerate(zip(self.lengths, self.counts, strict=True)):
            heads = self.qkv[self.offsets[row] : self.offsets[row + 1]].reshape(count, -1, width)
            places = before + np.arange(count)
            turned = rotated(
                heads[:, : num_heads + key_heads].astype(np.float64),
                self.shape.angles[places],
                interleaved,
            )
            pages, slots = self.table[row, places // PAGE_SIZE], places % PAGE_SIZE
            cache[pages, 0, LAYER, slots] = turned[:, num_heads:]
            cache[pages, 1, LAYER, slots] = heads[:, num_heads + key_heads :]
            both = cache[self.table[row], :, LAYER].swapaxes(0, 1)
            keys, values = both.reshape(2, -1, key_heads, width).astype(np.float64)
            for new, place in enumerate(places):
                for head in range(num_heads):
                    key_head = head // (num_heads // key_heads)
                    scores = SCALE * keys[: place + 1, key_head] @ turned[new, head]
                    weights = np.exp(scores - scores.max())
                    mean = weights / weights.sum() @ values[: place + 1, key_head]
                    found[self.offsets[row] + new, head] = mean
        return found.reshape(len(found), -1), cache


def rotated(
    heads: npt.NDArray[np.float64], angles: npt.NDArray[np.float64], interleaved: bool
) -> npt.NDArray[np.float64]:
    """Heads `[T, heads, D]`, each pair turned by its angle."""
    cos, sin = np.cos(angles)[:, None], np.sin(angles)[:, None]
    pairs = (
        heads.reshape(*heads.shape[:2], -1, 2).swapaxes(-1, -2)
        if interleaved
        else heads.reshape(*heads.shape[:2], 2, -1)
    )  # [T, heads, 2, D / 2]
    one, other = pairs[:, :, 0], pairs[:, :, 1]
    turned = np.stack([one * cos - other * sin, one * sin + other * cos], axis=2)
    return (turned.swapaxes(-1, -2) if interleaved else turned).reshape(heads.shape)


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize(
    ("lengths", "counts"),
    [
        ([0], [1]),
        ([63], [1]),
        ([64], [3]),
        ([0], [150]),
        ([300], [4]),
        ([5, 200, 0], [1, 4, 30]),
        # More rows than are computed side by side, pages of which the last is barely begun.
        ([0, 127, 128, 64, 255], [100, 2, 1, 65, 1]),
    ],
)
def test_rows_attend_to_what_is_before_them(
    models: dict[bool, Model], lengths: list[int], counts: list[int], interleaved: bool
) -> None:
    batch = Batch(lengths, counts)
    (found, cache), (expected, stored) = batch.run(models[interleaved]), batch.expected(interleaved)
    np.testing.assert_allclose(found, expected, rtol=0, atol=TOLERANCE)
    np.testing.assert_allclose(cache, stored, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("step", [1, 2, 3, 5, 8, 40])
def test_a_row_is_the_same_to_the_last_bit_whatever_is_computed_beside_it(
    models: dict[bool, Model], step: int
) -> None:
    whole = Batch([150, 7], [40, 1])
    expected, stored = whole.run(models[False])
    rows, cache = [], whole.cache
    for start in range(0, 40, step):
        found, cache = whole.rows(start, min(step, 40 - start), cache).run(models[False])
        rows.append(found)
    assert_same_bits(np.concatenate(rows), expected[:40])
    page = whole.table[0, 1]
    np.testing.assert_array_equal(cache[page], stored[page])


@pytest.mark.parametrize("count", [1, 2, 3, 4, 5, 8, 33])
def test_heads_that_share_keys_attend_to_what_is_before_them(grouped: Model, count: int) -> None:
    """The rows straddle a chunk, a page, or both; a sequence of its own has none before it."""
    lengths, counts = [63, 126, 320, 0], [count, count, 1, 2]
    batches = [Batch(lengths, counts, shape=shape) for shape in SHAPES]
    for batch, (found, cache) in zip(batches, run_all(grouped, batches), strict=True):
        expected, stored = batch.expected(False)
        np.testing.assert_allclose(found, expected, rtol=0, atol=4 * TOLERANCE)
        np.testing.assert_allclose(cache, stored, rtol=0, atol=4 * TOLERANCE)


@pytest.mark.parametrize("step", [1, 2, 3, 4, 5, 9])
def test_rows_that_share_keys_are_the_same_to_the_last_bit(grouped: Model, step: int) -> None:
    """A prompt in one piece, or some rows at a time, across the ends of a chunk and of a page."""
    wholes = [Batch([110], [40], shape=shape) for shape in SHAPES]
    expected = [found for found, _ in run_all(grouped, wholes)]
    caches = [whole.cache for whole in wholes]
    for start in range(0, 40, step):
        count = min(step, 40 - start)
        parts = [
            whole.rows(start, count, cache) for whole, cache in zip(wholes, caches, strict=True)
        ]
        both = run_all(grouped, parts)
        caches = [cache for _, cache in both]
        for (found, _), whole in zip(both, expected, strict=True):
            assert_same_bits(found, whole[start : start + count])


@pytest.mark.parametrize("count", [1, 3])
def test_a_sequence_is_the_same_to_the_last_bit_whether_threads_share_its_chunks(
    grouped: Model, count: int
) -> None:
    """Threads share those of one sequence; of many, each takes a whole one."""
    many = PAGES // 2
    batches = [Batch([200] * many, [count] * many, shape=shape) for shape in SHAPES]
    alone = [batch.rows(0, count, batch.cache) for batch in batches]
    for (found, _), (expected, _) in zip(
        run_all(grouped, alone), run_all(grouped, batches), strict=True
    ):
        assert_same_bits(found, expected[:count])


def assert_same_bits(found: Floats, expected: Floats) -> None:
    np.testing.assert_array_equal(found.view(np.uint32), expected.view(np.uint32))


@pytest.mark.parametrize("size", [-20.0, 20.0])
def test_scores_may_be_far_from_zero(models: dict[bool, Model], size: float) -> None:
    """All are near -120 or 120: the exponentials are 0 and infinite in float32."""
    batch = Batch([0, 100], [70, 1])
    heads = batch.qkv.reshape(len(batch.qkv), -1, WIDTH)
    heads[:, : HEADS + KEY_HEADS] = batch.cache[:, 0] = 0
    # The last number of the first half, which is hardly rotated.
    slowest = WIDTH // 2 - 1
    heads[:, :HEADS, slowest] = 20
    heads[:, HEADS : HEADS + KEY_HEADS, slowest] = size
    batch.cache[:, 0, ..., slowest] = size
    (found, _), (expected, _) = batch.run(models[False]), batch.expected(False)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-4)


def test_a_row_does_not_feel_values_that_it_does_not_see(models: dict[bool, Model]) -> None:
    batch = Batch([30], [5])
    expected, _ = batch.run(models[False])
    batch.qkv[3:] = np.inf
    found, _ = batch.run(models[False])
    assert_same_bits(found[:3], expected[:3])


def test_pages_may_be_apart(models: dict[bool, Model]) -> None:
    batch = Batch([5, 200], [1, 4])
    apart = 2 * LAYERS * PAGE_SIZE * KEY_HEADS * WIDTH
    expected, _ = batch.run(models[False])
    # Every other page of a pool twice as large: as if another cache had those between.
    pool = np.repeat(batch.cache, 2, axis=0)
    pool[1::2] = np.nan
    batch.cache = pool
    found, _ = batch.run(models[False], stride=2 * apart)
    np.testing.assert_array_equal(found, expected)
