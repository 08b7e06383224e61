"""Pearson's chi-square test of counts against an exact distribution."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from scipy import stats

__all__ = ["chi_square_p_value"]


def chi_square_p_value(
    counts: npt.ArrayLike, probs: npt.ArrayLike, *, min_expected: float = 5.0
) -> float:
    """Probability that samples from ``probs`` lie at least as far from it as ``counts``.

    Cells are pooled, least probable first, until each pool expects ``min_expected``
    samples; the pools depend on ``probs`` and the number of samples only.

    Args:
        counts: Samples per cell [V].
        probs: The distribution [V]; sums to 1.
        min_expected: The least number of samples that a pool may expect.

    Returns:
        The p-value; 0.0 if a cell of zero probability has been hit, 1.0 if there is one
        possible pool only.

    Raises:
        ValueError: The shapes differ, ``probs`` does not sum to 1, or there are fewer than
            ``min_expected`` samples.
    """
    observed = np.asarray(counts, dtype=np.float64)  # [V]
    expected = np.asarray(probs, dtype=np.float64) * observed.sum()  # [V]
    if observed.shape != expected.shape:
        raise ValueError(f"counts have shape {observed.shape}, probs {expected.shape}")
    if not np.isclose(np.sum(probs), 1.0, rtol=0, atol=1e-6):
        raise ValueError(f"probs sum to {np.sum(probs)}, not 1")
    if observed.sum() < min_expected:
        raise ValueError(f"{observed.sum():.0f} samples are fewer than {min_expected}")
    if observed[expected == 0].any():
        return 0.0
    starts = _pool_starts(np.sort(expected), min_expected)
    order = np.argsort(expected, kind="stable")
    pooled_observed = np.add.reduceat(observed[order], starts)
    pooled_expected = np.add.reduceat(expected[order], starts)
    if len(starts) == 1:
        return 1.0
    statistic = np.sum((pooled_observed - pooled_expected) ** 2 / pooled_expected)
    return float(stats.chi2.sf(statistic, df=len(starts) - 1))


def _pool_starts(ascending: npt.NDArray[np.float64], min_expected: float) -> list[int]:
    """First cell of each pool; cells left over at the end join the last pool."""
    starts, mass = [0], 0.0
    remaining = float(ascending.sum())
    for cell, expected in enumerate(ascending):
        if mass >= min_expected and remaining >= min_expected:
            starts.append(cell)
            mass = 0.0
        mass += expected
        remaining -= expected
    return starts
