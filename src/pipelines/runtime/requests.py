"""What an engine is asked, and what it answers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from max.pipelines.context import SamplingParams

from unispec.sampling.grammar import Grammar

__all__ = ["Report", "Request", "Result"]


@dataclass(frozen=True, kw_only=True)
class Request:
    """One prompt and how to answer it."""

    token_ids: Sequence[int]
    """The encoded prompt."""
    sampling: SamplingParams
    """Temperature, top-k and the like, stop conditions, and the seed."""
    grammar: Grammar | None = None
    """Constrains every generated token."""
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    """Added to the logits of these token ids."""
    images: Sequence[Any] = ()
    """For models that see: one for each placeholder token of the prompt, in order. A path, a
    file's bytes, a Pillow image, or a list of images that are frames of a video."""


@dataclass
class Result:
    """The answer to one request."""

    token_ids: list[int] = field(default_factory=list)
    """Generated tokens, EOS included."""
    text: str = ""
    """Decoded without special tokens, cut before a stop string."""
    finish_reason: str = ""
    """`"stop"`: EOS or a stop string; `"length"`: a limit was reached."""
    drafted: int = 0
    """Draft tokens that were verified."""
    accepted: int = 0
    """Draft tokens that were accepted."""


@dataclass(frozen=True)
class Report:
    """A run's answers in request order, and its figures."""

    results: list[Result]
    """One for each request."""
    acceptance_per_position: list[float]
    """Share of verifications that accepted the draft at each position, 0 to 1; K entries."""
    mean_acceptance_length: float
    """1 + accepted drafts per verification, which is at least 1; 1 without a draft."""
    tokens_per_second: float
    """Generated tokens over the run's wall time, prefill included."""
    time_to_first_token_s: float
    """From the run's start to the first token of any request."""
    step_time_s: float
    """Median wall time of a decode step."""
    graph_time_s: float
    """Median time of a decode step inside the compiled graph."""
    steps: int
    """Decode steps."""
