"""What `--json` prints."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from unispec.engine import Report, Result, SpeculationReport

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
            **({"speculation": _speculation(report.speculation)} if report.speculation else {}),
        },
        allow_nan=False,
    )


def _speculation(speculation: SpeculationReport) -> dict[str, Any]:
    """Who proposed, how many, and why; counts have vLLM's names."""
    count = speculation.num_speculative_tokens
    return {
        "num_speculative_tokens": (
            count if isinstance(count, int | str) else [list(each) for each in count.ranges]
        ),
        "sources": {
            source: {
                "num_drafts": found.verifications,
                "num_draft_tokens": found.drafted,
                "num_accepted_tokens": found.accepted,
                "num_accepted_tokens_per_pos": found.accepted_at,
            }
            for source, found in speculation.sources.items()
        },
        "steps_by_verified": _by_number(speculation.steps_by_verified),
        "steps_by_proposed": _by_number(speculation.steps_by_proposed),
        "expected_tokens_per_second": [
            _measured(rate) for rate in speculation.expected_tokens_per_second
        ],
    }


def _by_number(steps: Mapping[int, int]) -> dict[str, int]:
    return {str(number): steps[number] for number in sorted(steps)}


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
