"""Random numbers are uniform, independent, and functions of seed and position."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from acceptance_graph import MAX_ROWS, AcceptanceGraph
from acceptance_laws import P_VALUE, FloatArray, draws, noise
from reference.chi_square import chi_square_p_value
from scipy import stats

from unispec.sampling.seeds import Stream


@pytest.fixture(scope="session")
def uniforms(graph: AcceptanceGraph) -> dict[Stream, FloatArray]:
    """Draws of neighbouring seeds at neighbouring positions, 180,000 a stream."""
    return draws(graph, range(MAX_ROWS), 9)


@pytest.mark.parametrize("stream", Stream, ids=lambda stream: stream.name)
def test_draws_are_uniform(uniforms: dict[Stream, FloatArray], stream: Stream) -> None:
    values = uniforms[stream].ravel()
    assert values.min() >= 0
    assert values.max() < 1
    assert stats.kstest(values, "uniform").pvalue > P_VALUE


@pytest.mark.parametrize(
    ("first", "second"), list(itertools.combinations(Stream, 2)), ids=lambda stream: stream.name
)
def test_streams_are_independent(
    uniforms: dict[Stream, FloatArray], first: Stream, second: Stream
) -> None:
    assert grid_p_value(uniforms[first], uniforms[second]) > P_VALUE


@pytest.mark.parametrize("stream", Stream, ids=lambda stream: stream.name)
@pytest.mark.parametrize("lag", [1, 2, 8])
def test_positions_are_independent(
    uniforms: dict[Stream, FloatArray], stream: Stream, lag: int
) -> None:
    values = uniforms[stream]
    assert grid_p_value(values[:, :-lag], values[:, lag:]) > P_VALUE


@pytest.mark.parametrize("stream", Stream, ids=lambda stream: stream.name)
def test_seeds_are_independent(uniforms: dict[Stream, FloatArray], stream: Stream) -> None:
    values = uniforms[stream]
    assert grid_p_value(values[0::2], values[1::2]) > P_VALUE


def grid_p_value(first: FloatArray, second: FloatArray) -> float:
    """Chi-square of pairs on a 16 x 16 grid; no number is in two pairs of equal order."""
    cells = (first * 16).astype(np.int64) * 16 + (second * 16).astype(np.int64)
    return chi_square_p_value(np.bincount(cells.ravel(), minlength=256), np.full(256, 1 / 256))


def test_a_draw_depends_on_seed_and_position_only(graph: AcceptanceGraph) -> None:
    seeds = [0, 1, 2**32, 2**63, 2**64 - 1, 123_456_789]
    far = 100_000
    whole = draws(graph, seeds, 9, far)
    part = draws(graph, [7, *reversed(seeds)], 3, far + 5)
    for stream in Stream:
        np.testing.assert_array_equal(part[stream][:0:-1], whole[stream][:, 5:8])
        assert len(np.unique(whole[stream])) == whole[stream].size


@pytest.mark.parametrize("lead", [0.0, 8.0], ids=["flat", "peaked"])
def test_a_draw_inverts_the_distribution_of_a_large_vocabulary(
    graph: AcceptanceGraph, lead: float
) -> None:
    logits = noise(15, 128_000, scale=2.0).astype(np.float64)
    logits[5] = logits.max() + lead  # behind it, float32 sums would lose the small ones
    weights = np.exp(logits - logits.max()).astype(np.float32)
    below = np.append(0.0, weights.astype(np.float64).cumsum())
    below /= below[-1]
    rare = np.flatnonzero(np.diff(below) < 1e-7)[::500]
    # In the middle of tokens that a float32 sum would move, too.
    middles = (below[rare] + below[rare + 1]) / 2
    points = np.sort(np.concatenate([np.linspace(0, 1, 64, endpoint=False), middles]))
    drawn = graph.draw(weights, points)
    assert len(rare) > 10
    assert set(rare) <= set(drawn.tolist())
    assert (below[drawn] <= points + 1e-12).all()
    assert (points <= below[drawn + 1] + 1e-12).all()


def test_a_draw_never_takes_a_token_without_weight(graph: AcceptanceGraph) -> None:
    weights = np.array([0, 0, 1, 0, 3, 0, 0], np.float32)
    points = np.array([0, np.nextafter(0.25, 0), 0.25, np.nextafter(1, 0)])
    np.testing.assert_array_equal(graph.draw(weights, points), [2, 2, 4, 4])
