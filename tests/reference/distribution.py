"""The exact distribution that a sampled token must have, in float64."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt

__all__ = ["target_distribution"]

FloatArray = npt.NDArray[np.float64]


def target_distribution(
    logits: npt.ArrayLike,
    *,
    temperature: float,
    top_k: int = -1,
    top_p: float = 1.0,
    min_p: float = 0.0,
    presence_penalty: float = 0.0,
    frequency_penalty: float = 0.0,
    repetition_penalty: float = 1.0,
    prompt_ids: Sequence[int] = (),
    generated_ids: Sequence[int] = (),
    logit_bias: Mapping[int, float] | None = None,
    allowed: npt.NDArray[np.bool_] | None = None,
) -> FloatArray:
    """Probabilities [V] of the next token after ``prompt_ids`` and ``generated_ids``.

    The steps, in this order: repetition penalty, frequency and presence penalties, logit
    bias, grammar mask, temperature, top-k, top-p, min-p; each truncation acts on what the
    one before it left. Values tied with the last one kept are kept too.

    Args:
        logits: The target's raw logits [V].
        temperature: 0 puts all mass on the largest logit (the first one of a tie).
        top_k: Keeps the k most probable tokens; -1 keeps all.
        top_p: Keeps the smallest set of most probable tokens with at least this mass.
        min_p: Keeps tokens with at least this share of the largest probability.
        presence_penalty: Taken off once from each generated token (OpenAI API).
        frequency_penalty: Taken off for every occurrence of a generated token (OpenAI API).
        repetition_penalty: Divides positive and multiplies negative logits of tokens in
            the prompt or generated (CTRL, arXiv 1909.05858).
        prompt_ids: The prompt.
        generated_ids: What has been generated so far.
        logit_bias: Added to the logit of each of these tokens.
        allowed: Tokens that the grammar allows, bool [V]; None allows all.

    Raises:
        ValueError: No token is allowed.
    """
    scores = np.array(logits, dtype=np.float64)  # [V]
    seen = np.unique([*prompt_ids, *generated_ids]).astype(np.int64)
    scores[seen] = np.where(
        scores[seen] > 0, scores[seen] / repetition_penalty, scores[seen] * repetition_penalty
    )
    counts = np.bincount(np.array(generated_ids, dtype=np.int64), minlength=len(scores))
    scores -= frequency_penalty * counts + presence_penalty * (counts > 0)
    for token, bias in (logit_bias or {}).items():
        scores[token] += bias
    if allowed is not None:
        scores[~allowed] = -np.inf
    if np.all(np.isneginf(scores)):
        raise ValueError("no token is allowed")
    if temperature == 0:
        return np.asarray(np.eye(len(scores))[scores.argmax()])
    probs = _softmax(scores / temperature)
    if 0 < top_k < len(probs):
        probs = _keep(probs, np.sort(probs)[-top_k])
    if top_p < 1:
        probs = _keep(probs, _top_p_threshold(probs, top_p))
    return _keep(probs, min_p * probs.max())


def _softmax(scores: FloatArray) -> FloatArray:
    weights = np.exp(scores - scores.max())
    return np.asarray(weights / weights.sum())


def _keep(probs: FloatArray, threshold: float) -> FloatArray:
    """``probs`` renormalised over the entries that reach ``threshold``."""
    kept = np.where(probs >= threshold, probs, 0.0)
    return np.asarray(kept / kept.sum())


def _top_p_threshold(probs: FloatArray, top_p: float) -> float:
    """The smallest probability in the smallest set whose mass reaches ``top_p``."""
    descending = np.sort(probs)[::-1]
    last = int(np.searchsorted(np.cumsum(descending), top_p))
    return float(descending[min(last, len(probs) - 1)])
