"""Our attention on a CPU against numpy, over a paged cache with ragged rows."""

from __future__ import annotations

from collections.abc import Sequence

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

HEADS, KEY_HEADS, WIDTH = 6, 2, 32
PAGES, LAYERS, LAYER, PAGE_SIZE = 24, 2, 1, 128
SCALE, THETA, POSITIONS = 0.3, 10_000.0, 1024
pytestmark = pytest.mark.compiles("attention_kernel")

CPU_REF = DeviceRef.CPU()
# Of float32 numbers near 1, of which some hundred are summed.
TOLERANCE = 2e-6

Floats = npt.NDArray[np.float32]
ANGLES = np.arange(POSITIONS)[:, None] * THETA ** (-np.arange(0, WIDTH, 2) / WIDTH)
FREQS = np.stack([np.cos(ANGLES), np.sin(ANGLES)], axis=-1).reshape(POSITIONS, WIDTH)


@pytest.fixture(scope="module")
def models() -> dict[bool, Model]:
    """By whether the two numbers that rotate together are neighbours."""
    return {interleaved: compile_attention(interleaved) for interleaved in (False, True)}


def compile_attention(interleaved: bool) -> Model:
    width = (HEADS + 2 * KEY_HEADS) * WIDTH
    types = [
        BufferType(DType.float32, ["pages", 2, LAYERS, PAGE_SIZE, KEY_HEADS, WIDTH], CPU_REF),
        TensorType(DType.float32, ["t", width], CPU_REF),
        TensorType(DType.uint32, ["offsets"], CPU_REF),
        TensorType(DType.float32, [POSITIONS, WIDTH], CPU_REF),
        TensorType(DType.int64, [1], CPU_REF),
        TensorType(DType.uint32, ["b"], CPU_REF),
        TensorType(DType.uint32, ["b", "row_pages"], CPU_REF),
        TensorType(DType.uint32, [], CPU_REF),
    ]
    with kernels_for(CPU_REF), Graph(f"attention_{interleaved}", input_types=types) as graph:
        blocks, *others = graph.inputs
        qkv, offsets, freqs, stride, lengths, table, layer = [value.tensor for value in others]
        cache = KVCacheInputsPerDevice(
            kv_blocks=blocks.buffer,
            cache_lengths=lengths,
            lookup_table=table,
            max_prompt_length=lengths,
            max_cache_length=lengths,
            page_stride=stride,
        )
        shape = (HEADS, KEY_HEADS, WIDTH, SCALE, interleaved)
        found = attention(qkv, Attending(offsets, freqs, cache, layer, *shape))
        graph.output(found)
    return InferenceSession(devices=[CPU()]).load(graph)


class Batch:
    """Rows of some length, each with some new tokens, in random pages."""

    def __init__(self, lengths: Sequence[int], counts: Sequence[int], *, seed: int = 0) -> None:
        random = np.random.default_rng(seed)
        self.lengths, self.counts = list(lengths), list(counts)
        pages = max(
            -(-(before + new) // PAGE_SIZE) for before, new in zip(lengths, counts, strict=True)
        )
        self.table = random.permutation(PAGES)[: len(lengths) * pages].reshape(len(lengths), pages)
        shape = (PAGES, 2, LAYERS, PAGE_SIZE, KEY_HEADS, WIDTH)
        self.cache = random.standard_normal(shape, dtype=np.float32)
        self.offsets = np.concatenate([[0], np.cumsum(counts)])
        width = (HEADS + 2 * KEY_HEADS) * WIDTH
        self.qkv = random.standard_normal((sum(counts), width), dtype=np.float32)

    def run(self, model: Model, *, stride: int = -1) -> tuple[Floats, Floats]:
        """What is put out, and the cache after it."""
        cache = Buffer.from_numpy(self.cache.copy())
        arrays = [
            self.qkv,
            self.offsets.astype(np.uint32),
            FREQS.astype(np.float32),
            np.array([stride], np.int64),
            np.array(self.lengths, np.uint32),
            self.table.astype(np.uint32),
            np.array(LAYER, np.uint32),
        ]
        (found,) = model.execute(cache, *map(Buffer.from_numpy, arrays))
        return np.array(found.to_numpy()), np.array(cache.to_numpy())

    def expected(self, interleaved: bool) -> tuple[npt.NDArray[np.float64], Floats]:
        cache = self.cache.copy()
        found = np.zeros((sum(self.counts), HEADS, WIDTH))
        for row, (before, count) in enumerate(zip(self.lengths, self.counts, strict=True)):
            heads = self.qkv[self.offsets[row] : self.offsets[row + 1]].reshape(count, -1, WIDTH)
            places = before + np.arange(count)
            turned = rotated(heads[:, : HEADS + KEY_HEADS].astype(np.float64), places, interleaved)
            pages, slots = self.table[row, places // PAGE_SIZE], places % PAGE_SIZE
            cache[pages, 0, LAYER, slots] = turned[:, HEADS:]
            cache[pages, 1, LAYER, slots] = heads[:, HEADS + KEY_HEADS :]
            both = cache[self.table[row], :, LAYER].swapaxes(0, 1)
            keys, values = both.reshape(2, -1, KEY_HEADS, WIDTH).astype(np.float64)
            for new, place in enumerate(places):
                for head in range(HEADS):
                    key_head = head // (HEADS // KEY_HEADS)
                    scores = SCALE * keys[: place + 1, key_head] @ turned[new, head]
                    weights = np.exp(scores - scores.max())
                    mean = weights / weights.sum() @ values[: place + 1, key_head]
                    found[self.offsets[row] + new, head] = mean
        return found.reshape(len(found), -1), cache


def rotated(
    heads: npt.NDArray[np.float64], places: npt.NDArray[np.int64], interleaved: bool
) -> npt.NDArray[np.float64]:
    """Heads `[T, heads, D]`, each pair turned by the angles of its place."""
    cos, sin = np.cos(ANGLES[places])[:, None], np.sin(ANGLES[places])[:, None]
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
    part = Batch([150], [40])
    part.table, part.cache = whole.table[:1], whole.cache.copy()
    rows = []
    for start in range(0, 40, step):
        count = min(step, 40 - start)
        part.lengths, part.counts, part.offsets = [150 + start], [count], np.array([0, count])
        part.qkv = whole.qkv[start : start + count]
        found, part.cache = part.run(models[False])
        rows.append(found)
    np.testing.assert_array_equal(
        np.concatenate(rows).view(np.uint32), expected[:40].view(np.uint32)
    )
    page = whole.table[0, 1]
    np.testing.assert_array_equal(part.cache[page], stored[page])


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
    np.testing.assert_array_equal(found[:3].view(np.uint32), expected[:3].view(np.uint32))


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
