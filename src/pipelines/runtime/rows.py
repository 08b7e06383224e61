"""What the runtime keeps of each request between steps."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
from max.pipelines.context import SamplingParams, TextContext

from unispec.errors import InputError
from unispec.sampling.grammar import GrammarState
from unispec.sampling.inputs import PER_ROW, RowSampling

from .draft_probs import DraftProbs
from .metrics import Acceptance
from .proposals import RowSpeculation
from .sampling_params import check_logprobs, check_sampling

__all__ = ["Row", "check_vocabulary", "in_prefill", "make_row"]


@dataclass
class Row:
    """One request's state beside its token buffer."""

    sampling: RowSampling
    """Sampling parameters and token counts."""
    min_new_tokens: int = 0
    """What ends the answer is masked until so many tokens are generated."""
    ignored_eos: frozenset[int] = frozenset()
    """EOS tokens that are masked as long as the grammar allows another."""
    grammar: GrammarState | None = None
    """How far the output has come in its grammar; None: any token may follow."""
    drafts: list[int] = field(default_factory=list)
    """What the draft proposed in the last step, or what is verified in this one; empty before the
    first token."""
    draft_probs: DraftProbs | None = None
    """What sampled drafts were drawn from."""
    deferred: list[int] = field(default_factory=list)
    """Rows of the feature log with its last positions, those that the draft has not read."""
    generated: int = 0
    """Tokens emitted so far."""
    acceptance: Acceptance = field(default_factory=Acceptance)
    """What became of its drafts."""
    speculation: RowSpeculation | None = None
    """Who proposes for it; None: nothing was planned yet."""

    def emit(self, token: int) -> None:
        """Takes note of one generated token."""
        self.generated += 1
        self.sampling.count(token)
        if self.grammar is not None:
            self.grammar.accept(token)


def in_prefill(context: TextContext, row: Row) -> bool:
    """Whether its next step reads a prompt, or anew what a preempted request had."""
    tokens = context.tokens
    return not row.generated or tokens.actively_chunked or tokens.active_length > 1


def make_row(
    params: SamplingParams,
    prompt: Sequence[int] | npt.NDArray[np.int64],
    vocab_size: int,
    *,
    logit_bias: Mapping[int, float] | None = None,
    grammar: GrammarState | None = None,
    logprobs: int | None = None,
) -> Row:
    """Checks a request's values and makes of them what the steps need.

    Args:
        prompt: its token ids, at least one.
        logprobs: asks for the log probability of each token of the answer, and of this many of the
            most probable tokens; None: for none.

    Raises:
        InputError: a token outside the vocabulary, or sampling parameters or a number of log
            probabilities that cannot be used.
    """
    check_sampling(params)
    check_logprobs(logprobs)
    stop_token_ids = params.stop_token_ids or ()
    check_vocabulary((min(prompt), max(prompt), *stop_token_ids, *(logit_bias or ())), vocab_size)
    sampling = RowSampling(**{name: getattr(params, name) for name in PER_ROW})
    neutral = (params.presence_penalty, params.frequency_penalty, params.repetition_penalty)
    if neutral != (0, 0, 1):
        sampling.token_counts = np.zeros(vocab_size, np.int32)
        sampling.token_counts[np.asarray(prompt)] = -1
    if logprobs is not None:
        sampling.num_logprobs = 1 + min(int(logprobs), vocab_size)
    if logit_bias:
        sampling.logit_bias = np.zeros(vocab_size, np.float32)
        sampling.logit_bias[list(logit_bias)] = list(logit_bias.values())
    row = Row(sampling=sampling, min_new_tokens=params.min_new_tokens, grammar=grammar)
    if params.ignore_eos and grammar is not None:
        row.ignored_eos = grammar.eos_token_ids.difference(stop_token_ids)
    return row


def check_vocabulary(token_ids: Iterable[int], vocab_size: int) -> None:
    """Refuses tokens that the model does not have.

    Raises:
        InputError: a token outside the vocabulary.
    """
    for token in token_ids:
        if not 0 <= token < vocab_size:
            raise InputError(
                f"token id {token} is outside the model's vocabulary of {vocab_size}; use the"
                " tokenizer that belongs to the model"
            )
