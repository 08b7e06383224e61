"""Whether sampled answers follow the law of their target, as numbers that must be uniform."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from reference.chi_square import chi_square_p_value
from reference.distribution import target_distribution
from reference.target import TargetReference
from scipy import stats

from unispec.engine import Report, Request

__all__ = ["p_values", "places"]

FloatArray = npt.NDArray[np.float64]


def places(
    target: TargetReference, requests: Sequence[Request], report: Report, **law: Any
) -> FloatArray:
    """Where in the target's law each token of each answer lies, [answers, tokens].

    That is the mass of the tokens with smaller ids and a random part of its own: independent
    uniform numbers if, and only if, each token follows the target's law, given those before.
    """
    rng = np.random.default_rng(0)
    found = []
    for request, result in zip(requests, report.results, strict=True):
        ids = [*request.token_ids, *result.token_ids]
        _, logits = target.features_and_logits(ids[:-1])
        for at, token in enumerate(result.token_ids, start=len(request.token_ids) - 1):
            probs = target_distribution(logits[at].double().numpy(), **law)
            found.append(probs[:token].sum() + rng.random() * probs[token])
    return np.array(found).reshape(len(requests), -1)


def p_values(values: FloatArray) -> list[float]:
    """Of uniform and independent values [N, tokens]: each, and pairs of one and of two apart."""
    shares = [float(stats.kstest(values.ravel(), "uniform").pvalue)]
    for lag in (1, 2):
        # No number is in two pairs.
        width = values.shape[1] // (2 * lag) * 2 * lag
        pairs = values[:, :width].reshape(len(values), -1, 2, lag)
        cells = (pairs[:, :, 0] * 8).astype(int) * 8 + (pairs[:, :, 1] * 8).astype(int)
        counts = np.bincount(cells.ravel(), minlength=64)
        shares.append(chi_square_p_value(counts, np.full(64, 1 / 64)))
    return shares
