"""What the runtime keeps of each request between steps."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
from max.pipelines.context import TextContext

from unispec.errors import InputError
from unispec.sampling.buffers import RowSampling
from unispec.sampling.grammar import GrammarState

from .metrics import Acceptance
from .sampling_params import check_sampling

__all__ = ["Row", "check_vocabulary", "make_row"]


@dataclass
class Row:
    """One request's state beside its token buffer."""

    sampling: RowSampling
    """Sampling parameters and token counts."""
    min_new_tokens: int = 0
    """EOS is masked until so many tokens are generated."""
    grammar: GrammarState | None = None
    """How far the output has come in its grammar; None: any token may follow."""
    drafts: list[int] = field(default_factory=list)
    """Proposals of the last step; empty before the first token."""
    draft_probs: npt.NDArray[np.float32] | None = None
    """`[K, V]`, what sampled drafts were drawn from."""
    generated: int = 0
    """Tokens emitted so far."""
    acceptance: Acceptance = field(default_factory=Acceptance)
    """What became of its drafts."""

    def emit(self, token: int) -> None:
        """Takes note of one generated token."""
        self.generated += 1
        self.sampling.count(token)
        if self.grammar is not None:
            self.grammar.accept(token)


def check_vocabulary(token_ids: Iterable[int], vocab_size: int) -> None:
    """Refuses tokens that the model does not have.

    Args:
        token_ids: of a request.
        vocab_size: V, the width of the logits.

    Raises:
        InputError: one of them is outside.
    """
    for token in token_ids:
        if not 0 <= token < vocab_size:
            raise InputError(
                f"token id {token} is outside the model's vocabulary of {vocab_size}; use the"
                " tokenizer that belongs to the model"
            )


def make_row(
    context: TextContext,
    vocab_size: int,
    *,
    logit_bias: Mapping[int, float] | None = None,
    grammar: GrammarState | None = None,
) -> Row:
    """Reads a request's sampling parameters.

    Args:
        context: the request.
        vocab_size: V, the width of the logits.
        logit_bias: added to the logits of these token ids.
        grammar: constrains every emitted token.

    Raises:
        InputError: a token outside the vocabulary, or sampling parameters that cannot be used.
    """
    params = context.sampling_params
    prompt = context.tokens.prompt
    check_sampling(params)
    check_vocabulary((int(prompt.min()), int(prompt.max())), vocab_size)
    check_vocabulary([*(params.stop_token_ids or ()), *(logit_bias or ())], vocab_size)
    sampling = RowSampling(
        seed=int(params.seed),
        temperature=params.temperature,
        top_k=max(params.top_k, 0),
        top_p=params.top_p,
        min_p=params.min_p,
        presence_penalty=params.presence_penalty,
        frequency_penalty=params.frequency_penalty,
        repetition_penalty=params.repetition_penalty,
    )
    neutral = (params.presence_penalty, params.frequency_penalty, params.repetition_penalty)
    if neutral != (0, 0, 1):
        sampling.token_counts = np.zeros(vocab_size, np.int32)
        sampling.token_counts[prompt] = -1
    if logit_bias:
        sampling.logit_bias = np.zeros(vocab_size, np.float32)
        sampling.logit_bias[list(logit_bias)] = list(logit_bias.values())
    # A grammar's text that can only end does so all the same.
    ends_late = params.ignore_eos and grammar is not None
    return Row(
        sampling=sampling,
        min_new_tokens=context.max_length if ends_late else params.min_new_tokens,
        grammar=grammar,
    )
