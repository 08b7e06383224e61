"""What an engine is asked, and what it answers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from max.pipelines.context import SamplingParams, TextContext
from max.pipelines.request import RequestID

from unispec.pipelines.runtime.metrics import Acceptance, StepTimes
from unispec.pipelines.runtime.proposals import Source
from unispec.pipelines.runtime.rows import Row
from unispec.pipelines.runtime.speculating import DraftCount
from unispec.sampling.grammar import Grammar

__all__ = [
    "Output",
    "Report",
    "Request",
    "Result",
    "SpeculationReport",
    "Step",
    "StepRow",
    "TokenLogprobs",
]


@dataclass(frozen=True, kw_only=True)
class Request:
    """One prompt and how to answer it."""

    token_ids: Sequence[int]
    """The encoded prompt: a list of integers, or a NumPy array of one dimension."""
    sampling: SamplingParams
    """Temperature, top-k and the like, stop conditions, and the seed. With `ignore_eos` an answer
    still ends at a stop text and at one of `stop_token_ids`."""
    grammar: Grammar | None = None
    """Constrains every generated token. With `ignore_eos` the answer goes on for as long as the
    grammar allows."""
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    """Added to the logits of these token ids."""
    images: Sequence[Any] = ()
    """For models that see: one for each placeholder token of the prompt, in order. A path, a
    file's bytes, a Pillow image, or a list of images that are frames of a video."""
    logprobs: int | None = None
    """Asks for the log probability of each token of the answer, and of this many of the most
    probable tokens in its place, 0 to 20; None: for none."""


@dataclass(frozen=True, kw_only=True)
class TokenLogprobs:
    """Natural logarithms of what the target gives to one token of an answer, and to others.

    They are those of the model's own distribution: before penalties, bias, grammar, temperature
    and the like.
    """

    logprob: float
    """The token's own."""
    top: Mapping[int, float]
    """Of the most probable tokens by token id, as many as were asked for, the best one first."""


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
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    """One for each of `token_ids`; empty where the request does not ask."""


@dataclass(frozen=True, kw_only=True)
class Output:
    """What one step brought for one request."""

    request_id: RequestID
    """As `Engine.add` returned it."""
    token_ids: Sequence[int] = ()
    """New tokens of the answer."""
    text: str = ""
    """New text that is certain; what may become a stop string or half a character waits."""
    logprobs: Sequence[TokenLogprobs] = ()
    """One for each of `token_ids`; none where the request does not ask."""
    step: StepTimes | None = None
    """When the step was; None with an error."""
    result: Result | None = None
    """The whole answer, once it is complete."""
    error: BaseException | None = None
    """What the step raised: the request was taken out and will not be answered."""

    @property
    def is_last(self) -> bool:
        """Whether nothing of this request follows."""
        return self.result is not None or self.error is not None


@dataclass(frozen=True, kw_only=True)
class StepRow:
    """One request of a step, as the step left it: to be looked at, not to be kept or changed."""

    context: TextContext
    """What MAX's classes know of it: its id, its tokens so far, its parameters."""
    row: Row
    """What else is kept of it, such as the drafts that its next step verifies."""
    token_ids: Sequence[int]
    """What the step brought; none for a part of a prompt that is not the last."""


@dataclass(frozen=True, kw_only=True)
class Step:
    """One step of the batch, the requests of all callers."""

    times: StepTimes
    """When it was."""
    rows: Sequence[StepRow]
    """Its requests."""


@dataclass(frozen=True, kw_only=True)
class SpeculationReport:
    """Who proposed tokens in one call, and how many each step took."""

    num_speculative_tokens: DraftCount
    """K as it was set when the call ended."""
    sources: Mapping[Source, Acceptance]
    """What became of the proposals of the draft, and of n-grams."""
    steps_by_verified: Mapping[int, int]
    """Decode steps that verified so many drafts a row."""
    steps_by_proposed: Mapping[int, int]
    """Decode steps in which the draft proposed so many tokens a row."""
    expected_tokens_per_second: Sequence[float] = ()
    """Why the last step chose as it did: what is expected, of all rows together, from verifying 0,
    1, ... drafts a row; empty where K is set."""


@dataclass(frozen=True)
class Report:
    """The answers of one call in request order, and its figures."""

    results: list[Result]
    """One for each request."""
    acceptance_per_position: list[float]
    """Share of verifications that accepted the draft at each position, 0 to 1; K entries."""
    mean_acceptance_length: float
    """1 + accepted drafts per verification, which is at least 1; 1 without a draft."""
    tokens_per_second: float
    """Generated tokens over the call's wall time, prefill included."""
    time_to_first_token_s: float
    """From the call's start to the first token of any of its requests."""
    step_time_s: float
    """Median wall time of a decode step."""
    graph_time_s: float
    """Median time of a decode step inside the compiled graph."""
    steps: int
    """Decode steps that a request of this call took part in."""
    decode_steps: Sequence[StepTimes] = ()
    """Each of them."""
    speculation: SpeculationReport | None = None
    """How tokens were proposed; None without a speculative method."""
