"""The random numbers and the draw, by themselves: every bit, every key, all of the mass."""

from __future__ import annotations

import itertools
from collections.abc import Mapping

import numpy as np
import numpy.typing as npt
import pytest
from random_graph import RandomGraph
from reference.chi_square import chi_square_p_value
from reference.philox import numbers as reference_numbers
from reference.philox import philox
from scipy import stats

from unispec.sampling.seeds import Stream

FloatArray = npt.NDArray[np.float64]
Numbers = Mapping[Stream, FloatArray]

BITS = 48
"""Of a number."""
P_VALUE = 1e-4
"""Least p-value of a right generator; all seeds are fixed."""
ROWS, POSITIONS = 20_000, 9
STREAMS = pytest.mark.parametrize("stream", Stream, ids=lambda stream: stream.name)


@pytest.fixture(scope="module")
def random_graph() -> RandomGraph:
    """Generator and draw, compiled once."""
    return RandomGraph()


@pytest.fixture(scope="module")
def numbers(random_graph: RandomGraph) -> Numbers:
    """Those of neighbouring seeds at neighbouring positions, 180,000 a stream."""
    return random_graph.uniforms(np.arange(ROWS), np.arange(POSITIONS))


def digits(numbers: FloatArray) -> npt.NDArray[np.uint64]:
    """The 48 bits of each number."""
    return (numbers * 2**BITS).astype(np.uint64)


def lower(numbers: FloatArray) -> FloatArray:
    """The numbers that the lower 24 bits make."""
    return numbers * 2.0**24 % 1


def independence_p_value(first: FloatArray, second: FloatArray) -> float:
    """Chi-square of pairs on a 16 x 16 grid."""
    cells = (first * 16).astype(np.int64) * 16 + (second * 16).astype(np.int64)
    return chi_square_p_value(np.bincount(cells.ravel(), minlength=256), np.full(256, 1 / 256))


def test_the_reference_computes_the_published_values() -> None:
    """Two of the known answers that come with Random123, philox4x32 with 10 rounds."""
    zeros, ones = philox(np.zeros(1, np.uint64)), philox(~np.zeros(1, np.uint64), (2**32 - 1,) * 4)
    assert zeros[0].tolist() == [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]
    assert ones[0].tolist() == [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]


@STREAMS
def test_a_seed_and_a_position_have_the_same_number_in_every_version(
    random_graph: RandomGraph, stream: Stream
) -> None:
    seeds = [0, 1, 2**16, 2**32 - 1, 2**32, 2**40 + 5, 2**63, 2**64 - 1]
    positions = [0, 1, 2, 2**16 - 1, 2**16, 2**17 + 1, 2**31, 2**32, 2**40 + 3, 2**62]
    found = random_graph.uniforms(seeds, positions)[stream]
    expected = [reference_numbers(seed, positions, stream) for seed in seeds]
    np.testing.assert_array_equal(found, expected)


# Resolution and range


@STREAMS
def test_numbers_are_multiples_of_the_smallest_step(numbers: Numbers, stream: Stream) -> None:
    assert numbers[stream].dtype == np.float64
    np.testing.assert_array_equal(digits(numbers[stream]) / 2.0**BITS, numbers[stream])


@STREAMS
def test_every_bit_is_as_often_one_as_zero(numbers: Numbers, stream: Stream) -> None:
    found = digits(numbers[stream]).ravel()
    ones = [int((found >> np.uint64(bit) & np.uint64(1)).sum()) for bit in range(BITS)]
    worst = min(stats.binomtest(count, found.size).pvalue for count in ones)
    assert worst > P_VALUE / BITS


def test_no_number_comes_twice(numbers: Numbers) -> None:
    """540,000 numbers of 48 bits: two are equal with probability 0.0005, of 24 bits all but
    surely."""
    together = np.concatenate([numbers[stream].ravel() for stream in Stream])
    assert len(np.unique(together)) == together.size


@STREAMS
@pytest.mark.parametrize("half", ["upper", "lower"])
def test_numbers_are_uniform_up_to_both_ends(numbers: Numbers, stream: Stream, half: str) -> None:
    values = (lower(numbers[stream]) if half == "lower" else numbers[stream]).ravel()
    assert values.min() >= 0
    assert values.max() < 1
    assert stats.kstest(values, "uniform").pvalue > P_VALUE
    for share in (2.0**-10, 2.0**-13):
        for at_end in (values < share, values >= 1 - share):
            assert stats.binomtest(int(at_end.sum()), values.size, share).pvalue > P_VALUE


@STREAMS
def test_both_halves_of_a_number_are_independent(numbers: Numbers, stream: Stream) -> None:
    assert independence_p_value(numbers[stream], lower(numbers[stream])) > P_VALUE


# Keys


def test_streams_are_independent_in_the_lower_half_too(numbers: Numbers) -> None:
    for first, second in itertools.permutations(Stream, 2):
        for half in (lower(numbers[second]), numbers[second]):
            assert independence_p_value(lower(numbers[first]), half) > P_VALUE


@STREAMS
def test_positions_are_independent_in_the_lower_half_too(numbers: Numbers, stream: Stream) -> None:
    for lag in (1, 2, 8):
        before, after = numbers[stream][:, :-lag], numbers[stream][:, lag:]
        for first, second in ((lower(before), lower(after)), (lower(before), after)):
            assert independence_p_value(first, second) > P_VALUE


@STREAMS
def test_seeds_are_independent_in_the_lower_half_too(numbers: Numbers, stream: Stream) -> None:
    even, odd = numbers[stream][0::2], numbers[stream][1::2]
    for first, second in ((lower(even), lower(odd)), (lower(even), odd), (even, lower(odd))):
        assert independence_p_value(first, second) > P_VALUE


@pytest.mark.parametrize("base", [0, 5, 2**17 + 3, 2**33 + 1])
def test_every_bit_of_a_position_counts(random_graph: RandomGraph, base: int) -> None:
    """No position is taken modulo anything, for any purpose."""
    positions = [base, *(base ^ 1 << bit for bit in range(62))]
    found = random_graph.uniforms([7, 2**63 + 1], positions)
    together = np.concatenate([found[stream].ravel() for stream in Stream])
    assert len(np.unique(together)) == 3 * 2 * 63


@pytest.mark.parametrize("base", [0, 12_345, 2**32 + 9, 2**64 - 1])
def test_every_bit_of_a_seed_counts(random_graph: RandomGraph, base: int) -> None:
    """Two seeds that differ in one bit, be it the highest, have nothing in common."""
    seeds = [base, *(base ^ 1 << bit for bit in range(64))]
    found = random_graph.uniforms(seeds, [0, 1, 100_000, 2**40])
    together = np.concatenate([found[stream].ravel() for stream in Stream])
    assert len(np.unique(together)) == 3 * 65 * 4


@STREAMS
@pytest.mark.parametrize("bit", [8, 16, 17, 31, 32, 48])
def test_far_positions_are_independent(random_graph: RandomGraph, stream: Stream, bit: int) -> None:
    near = np.arange(4)
    found = random_graph.uniforms(np.arange(ROWS), [*near, *(near + 2**bit)])[stream]
    assert independence_p_value(found[:, :4], found[:, 4:]) > P_VALUE
    assert independence_p_value(lower(found[:, :4]), lower(found[:, 4:])) > P_VALUE


@STREAMS
@pytest.mark.parametrize("bit", [8, 16, 31, 32, 48, 63])
def test_far_seeds_are_independent(random_graph: RandomGraph, stream: Stream, bit: int) -> None:
    seeds = np.arange(ROWS, dtype=np.uint64) << np.uint64(1) & ~(np.uint64(1) << np.uint64(bit))
    seeds = np.unique(seeds)
    near = random_graph.uniforms(seeds, np.arange(4))[stream]
    far = random_graph.uniforms(seeds | np.uint64(1) << np.uint64(bit), np.arange(4))[stream]
    assert independence_p_value(near, far) > P_VALUE
    assert independence_p_value(lower(near), lower(far)) > P_VALUE


# The draw


def test_the_last_of_the_mass_is_reached(random_graph: RandomGraph) -> None:
    """Whose mass is 2**-30, at the end of the vocabulary: the points from 1 - 2**-30 on."""
    weights = np.array([1 - 2.0**-20, 2.0**-20 - 2.0**-30, 2.0**-30], np.float64)
    exact = weights.astype(np.float32)  # rounds nothing: the sum is 1 in float64
    np.testing.assert_array_equal(exact, weights)
    last = 1 - 2.0**-BITS
    points = [0, 1 - 2.0**-10, 1 - 2.0**-20 - 2.0**-40, 1 - 2.0**-20, 1 - 2.0**-30 - 2.0**-40]
    drawn = random_graph.draw(exact, [*points, 1 - 2.0**-30, last])
    assert drawn.tolist() == [0, 0, 0, 1, 1, 2, 2]


def test_both_ends_of_a_large_vocabulary_are_reached(random_graph: RandomGraph) -> None:
    """The first token with weight at 0, the last one just below 1, none beside them."""
    weights = np.random.default_rng(1).exponential(1, 128_256).astype(np.float32)
    weights[:1000] = weights[-1000:] = 0
    weights[1000] = weights[-1001] = 1e-4
    last = len(weights) - 1001
    drawn = random_graph.draw(weights, [0, 2.0**-BITS, 1 - 2.0**-33, 1 - 2.0**-BITS])
    assert drawn.tolist() == [1000, 1000, last, last]


@pytest.mark.parametrize("peak", [0, 60_000, 128_255])
def test_a_rare_token_has_its_share_of_the_numbers(random_graph: RandomGraph, peak: int) -> None:
    """A peak and 128,255 others of a few billionths each, by a grid around ten of those."""
    rng = np.random.default_rng(2)
    weights = (1e-8 * rng.uniform(0.2, 2, 128_256)).astype(np.float32)
    weights[peak] = 1
    ends = weights.astype(np.float64).cumsum()
    shares = weights / ends[-1]
    rare = [token for token in rng.integers(1, 128_255, 10).tolist() if token != peak]
    assert shares[rare].max() < 2e-8
    for token in rare:
        begin, share = (ends[token] - weights[token]) / ends[-1], float(shares[token])
        grid = begin + share * (np.arange(-32, 96) + 0.5) / 64  # its own are 32 to 95
        expected = np.searchsorted(ends, grid * ends[-1], side="right")
        drawn = random_graph.draw(weights, grid)
        np.testing.assert_array_equal(drawn, expected)
        assert np.count_nonzero(drawn == token) == 64
