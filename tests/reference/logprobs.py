"""Log probabilities of an answer, as the target's logits give them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch

from .target import TargetReference

if TYPE_CHECKING:
    from unispec.engine import Result

__all__ = ["assert_logprobs"]

TOLERANCE = 1e-4


def assert_logprobs(
    result: Result, target: TargetReference, prompt_ids: Sequence[int], *, count: int
) -> None:
    """Asserts that each token of an answer has its own and the ``count`` largest ones.

    Tokens whose logarithms are nearly equal may have changed places.
    """
    _, logits = target.features_and_logits([*prompt_ids, *result.token_ids])
    expected = torch.log_softmax(logits[len(prompt_ids) - 1 : -1], dim=-1).numpy()  # [n, V]
    assert len(result.logprobs) == len(result.token_ids) == len(expected)
    for token, found, row in zip(result.token_ids, result.logprobs, expected, strict=True):
        assert abs(found.logprob - row[token]) < TOLERANCE
        values = list(found.top.values())
        assert len(values) == count
        assert values == sorted(values, reverse=True)
        np.testing.assert_allclose(values, np.sort(row)[::-1][:count], rtol=0, atol=TOLERANCE)
        np.testing.assert_allclose(values, row[list(found.top)], rtol=0, atol=TOLERANCE)
