"""What the runtime keeps of each request between steps."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
from max.pipelines.context import TextContext

from unispec.errors import InputError
from unispec.sampling.buffers import RowSampling
from unispec.sampling.grammar import GrammarState

__all__ = ["Row", "make_row"]


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
    drafted: int = 0
    """Draft tokens that were verified."""
    accepted: int = 0
    """Draft tokens that were accepted."""

    def emit(self, token: int) -> None:
        """Takes note of one generated token."""
        self.generated += 1
        self.sampling.count(token)
        if self.grammar is not None:
            self.grammar.accept(token)


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
        InputError: a token id or prompt token outside the vocabulary.
    """
    params = context.sampling_params
    prompt = context.tokens.prompt
    for token in (int(prompt.min()), int(prompt.max()), *(logit_bias or {})):
        if not 0 <= token < vocab_size:
            raise InputError(
                f"token id {token} is outside the model's vocabulary of {vocab_size};"
                " encode with the model's own tokenizer"
            )
    sampling = RowSampling(
        seed=params.seed,
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
    return Row(sampling=sampling, min_new_tokens=params.min_new_tokens, grammar=grammar)
