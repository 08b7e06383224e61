"""Outputs of a unified graph on the host side."""

from __future__ import annotations

from dataclasses import dataclass

from max.driver import Buffer
from max.pipelines.lib import UnifiedEagleOutputs

__all__ = ["StepModelOutputs"]


@dataclass(kw_only=True)
class StepModelOutputs(UnifiedEagleOutputs):
    """One step's outputs; the log probabilities mean something where a row asks for them."""

    token_logprobs: Buffer
    """float32 `[B, K + 1]`: of the accepted drafts of each row, then of its next token."""
    top_tokens: Buffer
    """int64 `[B, K + 1, 20]`: the most probable tokens there, as many as a row asks for."""
    top_logprobs: Buffer
    """float32 `[B, K + 1, 20]`: of `top_tokens`."""
    next_lengths: Buffer
    """uint32 `[B]`: verified tokens of each row."""
    report: Buffer
    """int64 `[B, 2 + P]`: of each row accepted drafts, next token and P proposals."""
