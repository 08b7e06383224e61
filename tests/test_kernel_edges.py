"""Our products at the edges: short rows, numbers that are not finite, processors without VNNI."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from gguf import GGMLQuantizationType
from max.driver import CPU, Buffer
from max.dtype import DType
from max.engine import InferenceSession, Model
from max.graph import DeviceRef, Graph, TensorType
from random_blocks import random_blocks

from unispec.kernels import library
from unispec.kernels.forms import stored_shape
from unispec.kernels.operations import Matrix, linear, normed_linear
from unispec.kernels.packing import pack

pytestmark = pytest.mark.compiles("kernels")

CPU_REF = DeviceRef.CPU()
BLOCKS = {"q8_0": 96, "q4_0": 32, "q4_k": 256, "q5_k": 256, "q6_k": 256}
"""K by form."""
ROWS = 35
"""N."""
FLOAT_COLUMNS = 45
"""K of floats: no whole vectors."""
RANDOM = np.random.default_rng(7)
FLOAT_WEIGHT = RANDOM.standard_normal((ROWS, FLOAT_COLUMNS), dtype=np.float32)
GAMMA = RANDOM.standard_normal(FLOAT_COLUMNS, dtype=np.float32)
WEIGHTS = {
    form: random_blocks(GGMLQuantizationType[form.upper()], ROWS, columns, seed=columns)
    for form, columns in BLOCKS.items()
}
X = RANDOM.standard_normal((6, 256), dtype=np.float32)

Floats = npt.NDArray[np.float32]


def compiled(package: Path, *, floats: bool) -> Model:
    types = []
    for form, columns in BLOCKS.items():
        dtype, shape = stored_shape(form, ROWS, columns)
        types += [
            TensorType(DType.float32, ["m", columns], CPU_REF),
            TensorType(dtype, shape, CPU_REF),
        ]
    shape = [ROWS, FLOAT_COLUMNS]
    types += [
        TensorType(DType.float32, ["m", FLOAT_COLUMNS], CPU_REF),
        TensorType(DType.float32, shape, CPU_REF),
        TensorType(DType.float32, [32, FLOAT_COLUMNS], CPU_REF),
        TensorType(DType.float32, [FLOAT_COLUMNS], CPU_REF),
    ]
    name = f"edges_{floats}"
    with Graph(name, input_types=types, custom_extensions=[package]) as graph:
        values = [value.tensor for value in graph.inputs]
        outputs = [
            linear(values[2 * at], Matrix(values[2 * at + 1], form, ROWS))
            for at, form in enumerate(BLOCKS)
        ]
        if floats:
            x, weight, whole, gamma = values[-4:]
            three = [
                Matrix(whole, "f32", 32),
                Matrix(whole, "f32", 32),
                Matrix(weight, "f32", ROWS),
            ]
            outputs += [linear(x, three[2]), normed_linear(x, gamma, 1e-5, three)]
        graph.output(*outputs)
    return InferenceSession(devices=[CPU()]).load(graph)


def run(model: Model, x: Floats) -> list[Floats]:
    inputs = []
    for form, columns in BLOCKS.items():
        inputs += [np.ascontiguousarray(x[:, :columns]), pack(WEIGHTS[form])]
    inputs += [np.ascontiguousarray(x[:, :FLOAT_COLUMNS]), FLOAT_WEIGHT, FLOAT_WEIGHT[:32], GAMMA]
    found = model.execute(*(Buffer.from_numpy(np.ascontiguousarray(one)) for one in inputs))
    return [np.array(buffer.to_numpy()) for buffer in found]


@pytest.fixture(scope="module")
def model() -> Model:
    return compiled(library.kernel_package(), floats=True)


def test_rows_that_are_no_whole_vectors(model: Model) -> None:
    *_, product, normed = run(model, X)
    x = X[:, :FLOAT_COLUMNS].astype(np.float64)
    np.testing.assert_allclose(product, x @ FLOAT_WEIGHT.T, rtol=0, atol=2e-5)
    z = x / np.sqrt(np.square(x).mean(axis=1, keepdims=True) + 1e-5) * GAMMA
    three = np.concatenate([FLOAT_WEIGHT[:32], FLOAT_WEIGHT[:32], FLOAT_WEIGHT])
    np.testing.assert_allclose(normed, z @ three.T, rtol=0, atol=2e-5)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_is_not_hidden(model: Model, bad: float) -> None:
    x = X.copy()
    x[2, 5] = bad
    for found, expected in zip(run(model, x), run(model, X), strict=True):
        assert not np.isfinite(found[2]).any()
        others = [0, 1, 3, 4, 5]
        np.testing.assert_array_equal(found[others], expected[others])


@pytest.mark.parametrize("size", [0.0, 1e-38, 1e-31, 1e20])
def test_numbers_may_be_small_and_large(model: Model, size: float) -> None:
    x = X * np.float32(size)
    for found, (form, columns) in zip(run(model, x), BLOCKS.items(), strict=False):
        part, weight = x[:, :columns].astype(np.float64), WEIGHTS[form].floats().astype(np.float64)
        # What is below 1e-30 is taken as 0.
        bound = (1e-4 * np.abs(part) + 1e-30) @ np.abs(weight).T
        assert (np.abs(found - part @ weight.T) <= bound).all()


def test_without_vnni_the_sums_are_the_same(model: Model, tmp_path: Path) -> None:
    """Sums of integers are exact, so the portable code must give the same bits."""
    portable = tmp_path / "mojo"
    shutil.copytree(library._SOURCES, portable)
    source = portable / "product.mojo"
    text = source.read_text()
    condition = "CompilationTarget.has_vnni() and CompilationTarget.has_avx512f()"
    assert text.count(condition) == 1
    source.write_text(text.replace(condition, "False"))
    found = run(compiled(portable, floats=False), X)
    for one, other in zip(found, run(model, X), strict=False):
        np.testing.assert_array_equal(one.view(np.uint32), other.view(np.uint32))
