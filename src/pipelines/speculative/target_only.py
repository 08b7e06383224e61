"""The step of a target without a draft: the first half of a speculative step."""

from __future__ import annotations

from unispec.sampling.acceptance import AcceptanceRule

from .step import StepInputs, StepOutputs
from .verify import Target, verify

__all__ = ["target_only_step"]


def target_only_step(target: Target, rule: AcceptanceRule, step: StepInputs) -> StepOutputs:
    """Builds a step that proposes nothing; `step.draft_tokens` has no columns.

    Args:
        rule: the acceptance rule, which has no draft to decide on.
    """
    verified = verify(target, rule, step)
    accepted = verified.accepted
    return StepOutputs(
        num_accepted_draft_tokens=accepted.num_accepted,
        next_tokens=accepted.next_tokens,
        next_draft_tokens=step.draft_tokens,
        lengths=verified.lengths,
        logprobs=verified.logprobs,
    )
