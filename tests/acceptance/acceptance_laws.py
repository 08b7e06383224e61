"""Requests, random logits and draws that the tests of acceptance share."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
from acceptance_graph import VOCAB, AcceptanceGraph, Request

from unispec.sampling.seeds import Stream

__all__ = [
    "LOSSLESS",
    "ODD",
    "P_VALUE",
    "REQUESTS",
    "THIRDS",
    "FloatArray",
    "IntArray",
    "draws",
    "noise",
    "sample",
]

FloatArray = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.int64]

P_VALUE = 1e-3
"""Least p-value of a right sampler; all seeds are fixed."""

ODD = np.arange(VOCAB) % 2 == 1
THIRDS = np.arange(VOCAB) % 3 != 0


def noise(seed: int, *shape: int, scale: float = 1.5) -> npt.NDArray[np.float32]:
    """Random logits."""
    return np.random.default_rng(seed).normal(0, scale, shape).astype(np.float32)


def draws(
    graph: AcceptanceGraph, seeds: Sequence[int], count: int, first: int = 0
) -> dict[Stream, FloatArray]:
    """The uniform numbers [B, count] at positions `first` and up."""
    outcome = graph.run(
        [Request().row(seed) for seed in seeds],
        np.zeros(VOCAB, np.float32),
        np.full((len(seeds), count - 1), -1),
        first_position=first,
    )
    return outcome.uniforms


REQUESTS = {
    "temperature": Request(temperature=0.7),
    "top_k": Request(temperature=1.3, top_k=7),
    "top_p": Request(top_p=0.8),
    "min_p": Request(min_p=0.1),
    "grammar": Request(allowed=THIRDS),
    "everything": Request(
        temperature=0.9,
        top_k=14,
        top_p=0.95,
        min_p=0.03,
        presence_penalty=0.6,
        frequency_penalty=0.3,
        repetition_penalty=1.2,
        prompt=(0, 1, 2, 3),
        logit_bias={5: 1.0, 6: -1.0},
        allowed=ODD,
    ),
    "greedy": Request(temperature=0.0),
}
"""A batch is an even mixture of these."""

LOSSLESS = ["matching", "rejection"]


def sample(law: FloatArray, uniform: FloatArray) -> IntArray:
    """Inverts the cumulative law [..., V] at uniform [...]; -1 where the law is zero."""
    cumulative = law.cumsum(axis=-1)
    point = uniform * cumulative[..., -1]
    token = np.asarray((cumulative <= point[..., np.newaxis]).sum(axis=-1), np.int64)
    return np.where(cumulative[..., -1] > 0, token, -1)
