"""From a request to what the batch runs of it."""

from __future__ import annotations

import threading
from collections.abc import Set
from typing import Any

from max.pipelines.context import EOSTracker, TextContext
from transformers import PreTrainedTokenizerFast

from unispec.errors import InputError
from unispec.pipelines.runtime.model import StepModel
from unispec.pipelines.runtime.rows import make_row
from unispec.sampling.grammar import Grammar, GrammarCompiler, GrammarState

from .answer import Answer, Outbox
from .requests import Request
from .text_stream import TextStream

__all__ = ["AnswerFactory"]


class AnswerFactory:
    """Checks requests against the model and makes an `Answer` of each, in any thread.

    Args:
        max_length: longest sequence, prompt and output, in tokens.
        eos_token_ids: end an answer, unless its request ignores them.

    Attributes:
        eos_token_ids: those of the answers that are made from now on.
    """

    def __init__(
        self,
        model: type[StepModel],
        hf: Any,
        tokenizer: PreTrainedTokenizerFast,
        *,
        max_length: int,
        eos_token_ids: Set[int],
    ) -> None:
        self._model = model
        self._hf = hf
        self._tokenizer = tokenizer
        self._max_length = max_length
        self.eos_token_ids = eos_token_ids
        self._vocab_size = int(hf.get_text_config().vocab_size)
        self._grammars: GrammarCompiler | None = None
        self._compiling = threading.Lock()

    def make(self, request: Request, name: str, outbox: Outbox) -> Answer:
        """The answer of a request that `read_request` has passed, still empty.

        Raises:
            InputError: what `Engine.generate` refuses of a single request, but for cache pages.
        """
        if not request.token_ids:
            raise InputError(f"{name} is empty; give at least one token")
        grammar = self._grammar(request.grammar)
        try:
            row = make_row(
                request.sampling,
                request.token_ids,
                self._vocab_size,
                logit_bias=request.logit_bias,
                grammar=grammar,
                logprobs=request.logprobs,
            )
        except InputError as error:
            raise InputError(f"{name}: {error}") from error
        context = self._context(request, name)
        stream = TextStream(self._tokenizer, request.sampling.stop or ())
        return Answer(context, row, stream, outbox)

    def _context(self, request: Request, name: str) -> TextContext:
        params = request.sampling
        prompt = self._model.read_prompt(self._hf, request.token_ids, request.images, name=name)
        length = len(prompt.tokens)
        if length >= self._max_length:
            raise InputError(
                f"{name} has {length} tokens, max_length is {self._max_length} and an answer needs"
                " at least one more: shorten the prompt or raise max_length"
            )
        limit = self._max_length - length
        max_length = length + min(params.max_new_tokens or limit, limit)
        if params.min_new_tokens > max_length - length:
            raise InputError(
                f"min_new_tokens is {params.min_new_tokens}, but {name} has room for"
                f" {max_length - length} new tokens: lower it, or raise max_new_tokens or"
                " max_length"
            )
        ends = set(params.stop_token_ids or ())
        # What ignores EOS under a grammar goes on until nothing else is allowed.
        if request.grammar is not None or not params.ignore_eos:
            ends |= self.eos_token_ids
        return prompt.context(
            max_length=max_length,
            eos_tracker=EOSTracker(eos_token_ids=ends),
            sampling_params=params,
            vocab_size=self._vocab_size,
        )

    def _grammar(self, grammar: Grammar | None) -> GrammarState | None:
        if grammar is None:
            return None
        with self._compiling:
            if self._grammars is None:
                self._grammars = GrammarCompiler(
                    self._tokenizer, self._vocab_size, sorted(self.eos_token_ids)
                )
            return self._grammars.compile(grammar).start()
