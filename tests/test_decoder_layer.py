"""A decoder layer in one operation gives, to the bit, what its two halves give, and stores what
storing alone does."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import pytest
from gguf import GGMLQuantizationType
from max.driver import CPU, Buffer
from max.dtype import DType
from max.engine import InferenceSession, Model
from max.graph import BufferType, DeviceRef, Graph, TensorType
from max.nn.kv_cache import KVCacheInputsPerDevice
from random_blocks import random_blocks

from unispec.kernels.forms import FLOATS, Form, stored_shape
from unispec.kernels.library import kernels_for
from unispec.kernels.operations import (
    Attending,
    AttentionHalf,
    Matrix,
    MLPHalf,
    Norm,
    attention_block,
    decoder_layer,
    mlp,
    store,
)
from unispec.kernels.packing import pack

pytestmark = pytest.mark.compiles("attention_kernel")

HEADS, KEY_HEADS, WIDTH, HIDDEN, INNER = 4, 2, 32, 256, 512
PAGES, PAGE_SIZE, POSITIONS, LENGTHS = 4, 128, 256, (130, 7)
CPU_REF = DeviceRef.CPU()


class Case(NamedTuple):
    """A kind of layer."""

    forms: dict[str, Form]
    """Of its matrices."""
    width: int = HIDDEN
    """Columns of what attention reads: the residual, or something else that has no norm."""
    interleaved: bool = False
    factors: tuple[float, float] = (0.5, 1.5)

    @property
    def shapes(self) -> dict[str, tuple[int, int]]:
        """Of its matrices, in the order of `forms`."""
        return {
            "q": (HEADS * WIDTH, self.width),
            "k": (KEY_HEADS * WIDTH, self.width),
            "v": (KEY_HEADS * WIDTH, self.width),
            "o": (HIDDEN, HEADS * WIDTH),
            "gate": (INNER, HIDDEN),
            "up": (INNER, HIDDEN),
            "down": (HIDDEN, INNER),
        }


CASES = (
    Case(dict.fromkeys(("q", "k", "v", "o", "gate", "up", "down"), "f32")),
    Case(dict(q="q8_0", k="q4_k", v="f16", o="q4_0", gate="q6_k", up="q6_k", down="f32")),
    Case(
        dict(q="f32", k="f32", v="q8_0", o="bf16", gate="f16", up="f16", down="q8_0"),
        width=2 * HIDDEN,
        interleaved=True,
    ),
)
"""Rows and blocks on both sides of every step; the last one as in an EAGLE-3 draft."""
RANDOM = np.random.default_rng(5)


@pytest.fixture(scope="module")
def model() -> Model:
    """Of each of `CASES` what the halves give and what the layer gives, and three caches: of the
    halves, of the layer, and of storing alone."""
    floats = DType.float32
    cache = BufferType(floats, [PAGES, 2, 1, PAGE_SIZE, KEY_HEADS, WIDTH], CPU_REF)
    types = [
        *[cache] * (3 * len(CASES)),
        TensorType(floats, ["t", HIDDEN], CPU_REF),
        TensorType(floats, ["t", 2 * HIDDEN], CPU_REF),
        TensorType(floats, [HIDDEN], CPU_REF),
        TensorType(DType.uint32, ["offsets"], CPU_REF),
        TensorType(floats, [POSITIONS, WIDTH], CPU_REF),
        TensorType(DType.int64, [1], CPU_REF),
        TensorType(DType.uint32, ["b"], CPU_REF),
        TensorType(DType.uint32, ["b", "row_pages"], CPU_REF),
        TensorType(DType.uint32, [], CPU_REF),
    ]
    for case in CASES:
        for name, form in case.forms.items():
            dtype, shape = stored_shape(form, *case.shapes[name])
            types.append(TensorType(dtype, shape, CPU_REF))
    with kernels_for(CPU_REF), Graph("decoder_layer", input_types=types) as graph:
        caches = [value.buffer for value in graph.inputs[: 3 * len(CASES)]]
        x, wide, gamma, offsets, freqs, stride, lengths, table, layer, *stored = [
            value.tensor for value in graph.inputs[3 * len(CASES) :]
        ]
        outputs = []
        for case in CASES:
            q, k, v, out, *others = [
                Matrix(stored.pop(0), form, case.shapes[name][0])
                for name, form in case.forms.items()
            ]
            second = MLPHalf(gamma, 1e-5, *others, case.factors[1])
            for way in ("halves", "layer", "store"):
                pages = KVCacheInputsPerDevice(
                    kv_blocks=caches.pop(0),
                    cache_lengths=lengths,
                    lookup_table=table,
                    max_prompt_length=lengths,
                    max_cache_length=lengths,
                    page_stride=stride,
                )
                shape = (HEADS, KEY_HEADS, WIDTH, 0.1, case.interleaved)
                attending = Attending(offsets, freqs, pages, layer, *shape)
                read, norm = (x, Norm(gamma, 1e-6)) if case.width == HIDDEN else (wide, None)
                first = AttentionHalf(read, x, norm, [q, k, v], out, attending, case.factors[0])
                if way == "layer":
                    outputs.append(decoder_layer(first, second))
                elif way == "halves":
                    outputs.append(mlp(attention_block(first), second))
                else:
                    store(read, norm, k, v, attending)
        graph.output(*outputs)
    return InferenceSession(devices=[CPU()]).load(graph)


def weight(form: Form, rows: int, columns: int) -> Buffer:
    if form not in FLOATS:
        return Buffer.from_numpy(pack(random_blocks(_kind(form), rows, columns)))
    floats = RANDOM.standard_normal((rows, columns), dtype=np.float32)
    if form == "bf16":
        upper = (floats.view(np.uint32) >> 16).astype(np.uint16)
        return Buffer.from_numpy(upper).view(DType.bfloat16, floats.shape)
    return Buffer.from_numpy(floats.astype(FLOATS[form].to_numpy()))


def _kind(form: Form) -> GGMLQuantizationType:
    return GGMLQuantizationType[form.upper()]


@pytest.mark.parametrize("counts", [(1, 1), (3, 2), (70, 1), (0, 2)])
def test_a_layer_is_its_halves_to_the_last_bit(model: Model, counts: tuple[int, int]) -> None:
    shape = (PAGES, 2, 1, PAGE_SIZE, KEY_HEADS, WIDTH)
    before = RANDOM.standard_normal(shape, dtype=np.float32)
    caches = [Buffer.from_numpy(before.copy()) for _ in range(3 * len(CASES))]
    angles = np.arange(POSITIONS)[:, None] * 0.1 ** np.arange(WIDTH // 2)
    arrays: list[npt.NDArray[np.generic]] = [
        RANDOM.standard_normal((sum(counts), HIDDEN), dtype=np.float32),
        RANDOM.standard_normal((sum(counts), 2 * HIDDEN), dtype=np.float32),
        RANDOM.standard_normal(HIDDEN, dtype=np.float32),
        np.array([0, counts[0], sum(counts)], np.uint32),
        np.stack([np.cos(angles), np.sin(angles)], -1).reshape(POSITIONS, -1).astype(np.float32),
        np.array([-1], np.int64),
        np.array(LENGTHS, np.uint32),
        np.array([[2, 1], [3, 0]], np.uint32),
        np.array(0, np.uint32),
    ]
    stored = [
        weight(form, *case.shapes[name]) for case in CASES for name, form in case.forms.items()
    ]
    found = [
        np.array(one.to_numpy())
        for one in model.execute(*caches, *map(Buffer.from_numpy, arrays), *stored)
    ]
    written = [np.array(cache.to_numpy()) for cache in caches]
    for at in range(len(CASES)):
        halves, layer = (one.view(np.uint32) for one in found[2 * at : 2 * at + 2])
        assert np.isfinite(found[2 * at]).all()
        np.testing.assert_array_equal(halves, layer)
        first, *others = written[3 * at : 3 * at + 3]
        assert (first != before).sum() == sum(counts) * 2 * KEY_HEADS * WIDTH
        for other in others:
            np.testing.assert_array_equal(first.view(np.uint32), other.view(np.uint32))
