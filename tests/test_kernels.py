"""Our operations on a CPU against numpy on dequantised weights, in each form of weights.

All are in one graph, which is compiled once; a run computes all of it for one number of rows.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import pytest
from gguf import GGMLQuantizationType
from max.driver import CPU, Buffer
from max.dtype import DType
from max.engine import InferenceSession, Model
from max.graph import DeviceRef, Graph, TensorType
from random_blocks import random_blocks

from unispec.checkpoints.block_formats import split_six_bits
from unispec.checkpoints.stored import StoredMatrix
from unispec.kernels.forms import FLOATS, stored_shape
from unispec.kernels.library import kernels_for
from unispec.kernels.operations import (
    Matrix,
    MLPHalf,
    Norm,
    embedding,
    linear,
    linear_add,
    mlp,
    normed_linear,
    pair,
)
from unispec.kernels.packing import pack

FORMS = ("f32", "bf16", "f16", "q8_0", "q4_0", "q4_k", "q5_k", "q6_k")
COUNTS = (1, 2, 3, 4, 5, 8, 16, 33)
"""M, rows of x in one run."""
COLUMNS = 512
"""K, whole blocks of every format."""
WIDTHS = (256, 256, 43)
"""N of three matrices; the last one ends within a tile."""
SHAPES = (*((rows, COLUMNS) for rows in WIDTHS), (COLUMNS, WIDTHS[0]))
"""N and K of these, and of a fourth one that leads back to K columns."""
FACTOR, EPS, EPS_BESIDE = 0.25, 1e-5, 0.5
pytestmark = pytest.mark.compiles("kernels")

CPU_REF = DeviceRef.CPU()
# Unit roundoff of float32, and of x beside blocks, by the largest number of 32.
FLOAT32, INTEGERS = 2.0**-24, 1 / (2 * 127 * 256)

Floats = npt.NDArray[np.float32]
Doubles = npt.NDArray[np.float64]


class Weights(NamedTuple):
    """A matrix `[N, K]`."""

    stored: Buffer
    floats: Doubles
    sizes: Doubles
    """What is summed of each number: the number, and what is subtracted from it apart."""


class Results(NamedTuple):
    """What the operations put out."""

    linear: Floats
    linear_add: Floats
    normed_linear: Floats
    mlp: Floats
    embedding: Floats
    pair: Floats
    normed_pair: Floats


def weights(form: str, rows: int, seed: int, columns: int = COLUMNS) -> Weights:
    if form in FLOATS:
        floats = np.random.default_rng(seed).standard_normal((rows, columns), dtype=np.float32)
        stored = Buffer.from_numpy(floats)
        if form == "f16":
            stored = Buffer.from_numpy(floats.astype(np.float16))
            floats = floats.astype(np.float16).astype(np.float32)
        elif form == "bf16":
            upper = (floats.view(np.uint32) >> 16).astype(np.uint16)
            stored = Buffer.from_numpy(upper).view(DType.bfloat16, floats.shape)
            floats = (upper.astype(np.uint32) << 16).view(np.float32)
        return Weights(stored, floats.astype(np.float64), np.abs(floats).astype(np.float64))
    matrix = random_blocks(GGMLQuantizationType[form.upper()], rows, columns, seed=seed)
    floats = matrix.floats().astype(np.float64)
    return Weights(Buffer.from_numpy(pack(matrix)), floats, np.abs(floats) + 2 * taken(matrix))


def taken(matrix: StoredMatrix) -> Doubles:
    """What is subtracted from each number."""
    fields = matrix.fields()
    if "dmin" not in (fields.dtype.names or ()):
        return np.zeros(matrix.shape)
    minima = split_six_bits(fields["scales"])[1] * np.abs(fields["dmin"].astype(float))[..., None]
    return minima.reshape(len(matrix), -1).repeat(32, axis=1)


@pytest.fixture(scope="module")
def matrices() -> Mapping[str, list[Weights]]:
    return {
        form: [
            *(weights(form, rows, seed=100 * at + place) for place, rows in enumerate(WIDTHS)),
            weights(form, COLUMNS, seed=100 * at + 50, columns=WIDTHS[0]),
        ]
        for at, form in enumerate(FORMS)
    }


@pytest.fixture(scope="module")
def model() -> Model:
    """All operations in all forms; compiled once."""
    x_type = TensorType(DType.float32, ["m", COLUMNS], CPU_REF)
    types = [
        x_type,
        TensorType(DType.float32, [COLUMNS], CPU_REF),
        TensorType(DType.float32, ["m", WIDTHS[2]], CPU_REF),
        TensorType(DType.int64, ["ids"], CPU_REF),
        TensorType(DType.float32, ["ids", WIDTHS[2]], CPU_REF),
        TensorType(DType.float32, [WIDTHS[2]], CPU_REF),
    ]
    for form in FORMS:
        for rows, columns in SHAPES:
            dtype, shape = stored_shape(form, rows, columns)
            types.append(TensorType(dtype, shape, CPU_REF))
    with kernels_for(CPU_REF), Graph("kernels", input_types=types) as graph:
        x, gamma, residual, ids, beside, gamma_beside, *stored = [
            value.tensor for value in graph.inputs
        ]
        outputs = []
        for form in FORMS:
            *three, down = [Matrix(stored.pop(0), form, rows) for rows, _ in SHAPES]
            outputs += [
                linear(x, three[2]),
                linear_add(residual, x, three[2], FACTOR),
                normed_linear(x, gamma, EPS, three),
                mlp(x, MLPHalf(gamma, EPS, three[0], three[1], down, FACTOR)),
                embedding(ids, three[2], COLUMNS),
                pair(ids, three[2], COLUMNS, None, beside, None),
                pair(
                    ids, three[2], COLUMNS, Norm(gamma, EPS), beside, Norm(gamma_beside, EPS_BESIDE)
                ),
            ]
        graph.output(*outputs)
    return InferenceSession(devices=[CPU()]).load(graph)


X = np.random.default_rng(1).standard_normal((max(COUNTS), COLUMNS), dtype=np.float32)
GAMMA = np.random.default_rng(2).standard_normal(COLUMNS, dtype=np.float32)
RESIDUAL = np.random.default_rng(3).standard_normal((max(COUNTS), WIDTHS[2]), dtype=np.float32)
IDS = np.array([0, 42, 17, 15, 16], np.int64)
BESIDE = np.random.default_rng(4).standard_normal((len(IDS), WIDTHS[2]), dtype=np.float32)
GAMMA_BESIDE = np.random.default_rng(5).standard_normal(WIDTHS[2], dtype=np.float32)


@pytest.fixture(scope="module")
def results(
    model: Model, matrices: Mapping[str, list[Weights]]
) -> Mapping[int, Mapping[str, Results]]:
    """Of each number of rows, of each form."""
    stored = [one.stored for form in FORMS for one in matrices[form]]

    def run(count: int) -> Mapping[str, Results]:
        arrays = (X[:count], GAMMA, RESIDUAL[:count], IDS, BESIDE, GAMMA_BESIDE)
        fixed = [Buffer.from_numpy(array) for array in arrays]
        found = [np.array(buffer.to_numpy()) for buffer in model.execute(*fixed, *stored)]
        size = len(Results._fields)
        return {form: Results(*found[at * size : (at + 1) * size]) for at, form in enumerate(FORMS)}

    return {count: run(count) for count in COUNTS}


def error_bound(form: str, x: Doubles, weight: Weights) -> Doubles:
    """Largest error of x W^T: each sum has K terms, and x beside blocks is rounded."""
    bound: Doubles = 2 * COLUMNS * FLOAT32 * np.abs(x) @ weight.sizes.T
    if form not in FLOATS:
        largest = np.abs(x).reshape(len(x), -1, 32).max(axis=-1).repeat(32, axis=1)
        bound += 1.01 * INTEGERS * largest @ weight.sizes.T
    return bound


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("count", COUNTS)
def test_products_are_those_of_the_dequantised_weights(
    results: Mapping[int, Mapping[str, Results]],
    matrices: Mapping[str, list[Weights]],
    form: str,
    count: int,
) -> None:
    found, three = results[count][form], matrices[form]
    x = X[:count].astype(np.float64)
    normed = x / np.sqrt(np.square(x).mean(axis=1, keepdims=True) + EPS) * GAMMA

    product, bound = x @ three[2].floats.T, error_bound(form, x, three[2])
    assert (np.abs(found.linear - product) <= bound).all()
    added = RESIDUAL[:count] + FACTOR * product
    assert (np.abs(found.linear_add - added) <= FACTOR * bound + FLOAT32 * np.abs(added)).all()

    products = [normed @ one.floats.T for one in three[:3]]
    # The norm itself adds a few roundings to each number that is multiplied.
    bounds = [1.02 * error_bound(form, normed, one) for one in three[:3]]
    joined = np.concatenate(products, axis=1)
    assert (np.abs(found.normed_linear - joined) <= np.concatenate(bounds, axis=1)).all()

    (gate, up), (gate_bound, up_bound) = products[:2], bounds[:2]
    activated = gate / (1 + np.exp(-gate.clip(-700)))
    # The activation's slope is at most 1.1.
    bound = 1.1 * gate_bound * (np.abs(up) + up_bound) + np.abs(activated) * up_bound
    inner = activated * up
    inner_bound = bound + 32 * FLOAT32 * np.abs(inner)
    down = three[3]
    bound = error_bound(form, inner, down) + 1.02 * inner_bound @ down.sizes.T
    added = x + FACTOR * inner @ down.floats.T
    assert (np.abs(found.mlp - added) <= FACTOR * bound + FLOAT32 * np.abs(added)).all()


@pytest.mark.parametrize("form", [form for form in FORMS if form not in FLOATS])
def test_errors_are_those_of_rounding_to_sixteen_bits(
    results: Mapping[int, Mapping[str, Results]], matrices: Mapping[str, list[Weights]], form: str
) -> None:
    """A number that is rounded to steps of s is off by s / sqrt(12) in the mean of squares."""
    count, weight = max(COUNTS), matrices[form][2]
    x = X[:count].astype(np.float64)
    largest = np.abs(x).reshape(count, -1, 32).max(axis=-1).repeat(32, axis=1)
    rounded = np.square(largest / (127 * 256)) / 12
    # Codes are exact: what is rounded is multiplied with the code's own number.
    expected = np.sqrt(rounded @ np.square(weight.floats).T)
    error = results[count][form].linear - x @ weight.floats.T
    assert 0.7 < np.sqrt(np.square(error / expected).mean()) < 1.3


@pytest.mark.parametrize("form", FORMS)
def test_an_embedding_is_rows_of_the_matrix(
    results: Mapping[int, Mapping[str, Results]], matrices: Mapping[str, list[Weights]], form: str
) -> None:
    rows = matrices[form][2].floats[IDS].astype(np.float32)
    np.testing.assert_array_equal(results[1][form].embedding, rows)


@pytest.mark.parametrize("form", FORMS)
def test_a_pair_is_an_embedding_beside_a_row(
    results: Mapping[int, Mapping[str, Results]], matrices: Mapping[str, list[Weights]], form: str
) -> None:
    rows = matrices[form][2].floats[IDS].astype(np.float32)
    found = results[1][form]
    np.testing.assert_array_equal(found.pair, np.concatenate([rows, BESIDE], axis=1))
    halves = [(rows, GAMMA, EPS), (BESIDE, GAMMA_BESIDE, EPS_BESIDE)]
    normed = [
        half / np.sqrt(np.square(half, dtype=float).mean(axis=1, keepdims=True) + eps) * gamma
        for half, gamma, eps in halves
    ]
    expected = np.concatenate(normed, axis=1)
    assert (np.abs(found.normed_pair - expected) <= 32 * FLOAT32 * np.abs(expected)).all()


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", ("linear", "linear_add", "normed_linear", "mlp"))
def test_a_row_is_the_same_to_the_last_bit_whatever_is_computed_beside_it(
    results: Mapping[int, Mapping[str, Results]], form: str, name: str
) -> None:
    most = getattr(results[max(COUNTS)][form], name)
    for count in COUNTS:
        found = getattr(results[count][form], name)
        np.testing.assert_array_equal(found.view(np.uint32), most[:count].view(np.uint32))
