"""Float weights to blocks: as exact as the formats allow, and only where the rows fit.

Numbers that are rounded to steps of s are off by s / sqrt(12) in the mean of squares. What the
simplest way to choose s gives bounds the error from above: the largest number of a part gets the
last code. The best that any s gives, found by trying hundreds of them, bounds it from below.
"""

from __future__ import annotations

from typing import Any

import gguf
import numpy as np
import numpy.typing as npt
import pytest
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

from unispec.checkpoints import StoredMatrix, Tensor
from unispec.checkpoints.quantise import quantise
from unispec.encodings import BLOCK_ENCODINGS
from unispec.errors import InputError

FloatTensor = npt.NDArray[np.float64]
of_each_encoding = pytest.mark.parametrize("encoding", BLOCK_ENCODINGS)


def blocks_of(tensor: Tensor, encoding: str) -> StoredMatrix:
    found = quantise(tensor, encoding, "w")
    assert isinstance(found, StoredMatrix)
    return found


def weights(distribution: str, shape: tuple[int, int] = (64, 1024)) -> npt.NDArray[np.float32]:
    random = np.random.default_rng(7)
    numbers = {
        "normal": random.normal(size=shape),
        "laplace": random.laplace(size=shape),
        "uniform": random.uniform(-1, 1, size=shape),
        "shifted": random.normal(size=shape) + 3,
        "one sign": -np.abs(random.normal(size=shape)),
    }[distribution]
    return (0.03 * numbers).astype(np.float32)


def rms(error: Tensor) -> float:
    return float(np.sqrt(np.square(error, dtype=np.float64).mean()))


def simplest_step(weight: Tensor, encoding: str) -> FloatTensor:
    """For each part of a row the step with which no number is cut off, `[N, parts]`."""
    size = 16 if encoding == "q6_k" else 32
    parts = weight.astype(np.float64).reshape(len(weight), -1, size)
    if encoding == "q4_k":
        # Codes 0 to 15 from the least number on, which is 0 if all are positive.
        return (parts.max(axis=-1) - np.minimum(parts.min(axis=-1), 0)) / 15
    largest = np.abs(parts).max(axis=-1)
    return largest / {"q8_0": 127, "q4_0": 8, "q6_k": 32}[encoding]


@of_each_encoding
@pytest.mark.parametrize("distribution", ["normal", "laplace", "uniform", "shifted", "one sign"])
def test_the_error_is_at_most_that_of_even_rounding(distribution: str, encoding: str) -> None:
    weight = weights(distribution)
    blocks = blocks_of(weight, encoding)
    assert blocks.kind.name == encoding.upper()
    numbers = gguf.dequantize(blocks.blocks, blocks.kind)
    assert numbers.shape == weight.shape
    bound = rms(simplest_step(weight, encoding)) / np.sqrt(12)
    # Q4_0 has no code for the largest number's opposite. Of even numbers 1 of 32 is cut by half a
    # step to a whole one, by 7 / 12 in the mean of squares: (31 / 12 + 7 / 12) / 32 is 1.19 / 12.
    slack = 1.19**0.5 if encoding == "q4_0" else 1.01
    assert rms(numbers - weight) <= slack * bound
    assert rms(numbers - weight) >= 0.75 * bound


@pytest.mark.parametrize("encoding", ["q8_0", "q4_0"])
def test_llama_cpps_simple_formats_are_the_gguf_packages(encoding: str) -> None:
    """In chunks of rows as in one go."""
    weight = weights("normal", (300, 1024))
    kind = GGMLQuantizationType[encoding.upper()]
    np.testing.assert_array_equal(blocks_of(weight, encoding).blocks, gguf.quantize(weight, kind))


def test_q8_0_by_hand() -> None:
    weight = np.zeros((1, 32), np.float32)
    weight[0, :4] = [127, -127, 1, -2.6]
    blocks = blocks_of(weight, "q8_0").blocks
    assert blocks[0, :2].view(np.float16) == 1.0
    assert blocks[0, 2:].view(np.int8).tolist() == [127, -127, 1, -3] + [0] * 28


def least_error(parts: FloatTensor, encoding: str) -> float:
    """RMS error of the best of many scales, without rounding of scales themselves."""
    best = np.full(len(parts), np.inf)
    largest = np.abs(parts).max(axis=1, keepdims=True)
    if encoding == "q6_k":
        for factor in np.linspace(26, 36, 500):
            for sign in (-1, 1):
                step = sign * largest / factor
                codes = np.clip(np.rint(parts / step), -32, 31)
                scale = (parts * codes).sum(1, keepdims=True) / np.square(codes).sum(
                    1, keepdims=True
                )
                best = np.minimum(best, np.square(parts - scale * codes).sum(1))
    else:
        low = np.minimum(parts.min(axis=1, keepdims=True), 0)
        high = parts.max(axis=1, keepdims=True)
        for start in np.linspace(0.85, 1.05, 25):
            for end in np.linspace(0.85, 1.05, 25):
                step = (high * end - low * start) / 15
                codes = np.clip(np.rint((parts - low * start) / step), 0, 15)
                best = np.minimum(best, np.square(parts - step * codes - low * start).sum(1))
    return float(np.sqrt(best.sum() / parts.size))


@pytest.mark.parametrize("encoding", ["q4_k", "q6_k"])
@pytest.mark.parametrize("distribution", ["normal", "laplace"])
def test_k_quants_are_near_the_best_that_there_is(distribution: str, encoding: str) -> None:
    weight = weights(distribution, (16, 1024))
    parts = weight.astype(np.float64).reshape(-1, 16 if encoding == "q6_k" else 32)
    error = rms(blocks_of(weight, encoding).floats() - weight)
    best = least_error(parts, encoding)
    assert 0.99 * best <= error <= 1.05 * best


@pytest.mark.parametrize("encoding", ["q4_k", "q6_k"])
def test_numbers_that_a_k_quant_has_come_back(encoding: str) -> None:
    """Scales are powers of two times whole numbers, and each part has its outermost codes."""
    random = np.random.default_rng(2)
    if encoding == "q4_k":
        codes = random.integers(0, 16, (8, 4, 8, 32))
        codes[..., :2] = [0, 15]
        scales, minima = random.integers(1, 64, (2, 8, 4, 8, 1))
        scales[:, :, 0] = minima[:, :, 0] = 63
        weight = 2.0**-9 * scales * codes - 2.0**-7 * minima
    else:
        codes = random.integers(-32, 32, (8, 4, 16, 16))
        codes[..., 0] = -32
        scales = random.integers(1, 128, (8, 4, 16, 1)) * random.choice([-1, 1], (8, 4, 16, 1))
        scales[:, :, 0] = 127
        weight = 2.0**-9 * scales * codes
    weight = weight.reshape(8, 1024).astype(np.float32)
    np.testing.assert_allclose(blocks_of(weight, encoding).floats(), weight, rtol=0, atol=1e-6)


@of_each_encoding
@pytest.mark.parametrize("value", [0.0, 0.5, -0.5])
def test_rows_of_one_number(value: float, encoding: str) -> None:
    weight = np.full((2, 512), value, np.float32)
    weight[1] = 0
    numbers = blocks_of(weight, encoding).floats()
    # float16 has 11 bits, and Q8_0 its number 127 times.
    np.testing.assert_allclose(numbers, weight, rtol=2**-10)


@of_each_encoding
def test_a_large_number_spoils_its_own_part_alone(encoding: str) -> None:
    """With K-quants also the scales of its block of 256, which are whole parts of the largest."""
    weight = weights("normal", (1, 1024))
    plain = blocks_of(weight, encoding).floats()
    weight[0, 300] = 2.0
    numbers = blocks_of(weight, encoding).floats()
    far = np.r_[0:256, 512:1024]
    np.testing.assert_array_equal(numbers[0, far], plain[0, far])
    assert abs(numbers[0, 300] - 2) <= simplest_step(weight, encoding).max() / 2


@of_each_encoding
@pytest.mark.parametrize("dtype", [np.float16, np.float64])
def test_other_floats_are_taken(encoding: str, dtype: Any) -> None:
    weight = weights("normal").astype(np.float16)
    expected = blocks_of(weight.astype(np.float32), encoding).blocks
    np.testing.assert_array_equal(blocks_of(weight.astype(dtype), encoding).blocks, expected)
    turned = np.asfortranarray(weight.astype(dtype))
    np.testing.assert_array_equal(blocks_of(turned, encoding).blocks, expected)


@pytest.mark.parametrize(
    ("encoding", "columns", "kind"),
    [
        ("q8_0", 96, "Q8_0"),
        ("q8_0", 100, None),
        ("q4_0", 96, "Q4_0"),
        ("q4_0", 16, None),
        ("q4_k", 512, "Q4_K"),
        ("q4_k", 576, "Q8_0"),
        ("q4_k", 40, None),
        ("q6_k", 256, "Q6_K"),
        ("q6_k", 32, "Q8_0"),
        ("q6_k", 1, None),
    ],
)
def test_rows_that_are_no_whole_blocks(encoding: str, columns: int, kind: str | None) -> None:
    weight = np.ones((3, columns), np.float32)
    found = quantise(weight, encoding, "w")
    if kind is None:
        assert found is weight
    else:
        assert isinstance(found, StoredMatrix)
        assert found.kind.name == kind
        block, block_bytes = GGML_QUANT_SIZES[found.kind]
        assert found.blocks.shape == (3, columns // block * block_bytes)
        assert found.origin is None


@of_each_encoding
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 1e9])
def test_numbers_that_no_scale_reaches(encoding: str, value: float) -> None:
    """The largest scale, 65504, takes Q8_0 to 8.3e6, Q4_K to 6.2e7 and Q6_K to 2.7e8."""
    weight = np.zeros((3, 512), np.float32)
    weight[1, 77] = value
    with pytest.raises(InputError, match=f"'layer.weight'.*{encoding}.*use float32"):
        quantise(weight, encoding, "a file: tensor 'layer.weight'")
