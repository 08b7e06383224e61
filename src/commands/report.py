"""What `--json` prints."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from unispec.engine import Report, Result

__all__ = ["to_json"]


def to_json(prompts: Sequence[str], report: Report) -> str:
    """Returns one JSON object, in ASCII and on one line.

    Args:
        report: what the engine measured; seconds for times. A value that was not measured
            (NaN) becomes null. Log probabilities are there where they were asked for.
    """
    results = [
        {
            "prompt": prompt,
            "text": result.text,
            "token_ids": list(result.token_ids),
            "finish_reason": result.finish_reason,
            "drafted": result.drafted,
            "accepted": result.accepted,
            **({"logprobs": _logprobs(result)} if result.logprobs else {}),
        }
        for prompt, result in zip(prompts, report.results, strict=True)
    ]
    return json.dumps(
        {
            "results": results,
            "mean_acceptance_length": _measured(report.mean_acceptance_length),
            "acceptance_per_position": [_measured(p) for p in report.acceptance_per_position],
            "tokens_per_second": _measured(report.tokens_per_second),
            "time_to_first_token_s": _measured(report.time_to_first_token_s),
            "step_time_s": _measured(report.step_time_s),
        },
        allow_nan=False,
    )


def _logprobs(result: Result) -> list[dict[str, Any]]:
    """Each token of an answer with the most probable ones in its place."""
    return [
        {
            "token_id": token,
            "logprob": found.logprob,
            "top": [{"token_id": other, "logprob": value} for other, value in found.top.items()],
        }
        for token, found in zip(result.token_ids, result.logprobs, strict=True)
    ]


def _measured(value: float) -> float | None:
    return float(value) if math.isfinite(value) else None
