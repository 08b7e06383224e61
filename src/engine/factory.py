"""From a request to what the batch runs of it."""

from __future__ import annotations

import threading
from collections.abc import Set
from typing import Any

from max.pipelines.context import TextContext
from transformers import PreTrainedTokenizerFast

from unispec.errors import InputError
from unispec.pipelines.runtime.contexts import make_context
from unispec.pipelines.runtime.model import StepModel
from unispec.pipelines.runtime.rows import Row, make_row
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
        vocab_size: V, the width of the logits.
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
        self.vocab_size = int(hf.get_text_config().vocab_size)
        self._grammars: GrammarCompiler | None = None
        self._compiling = threading.Lock()

    def make(self, request: Request, name: str, outbox: Outbox) -> Answer:
        """The answer of a request that `read_request` has passed, still empty.

        Raises:
            InputError: what `Engine.generate` refuses of a single request, but for cache pages.
        """
        grammar = self._grammar(request.grammar)
        row = self._row(request, name, grammar)
        context = self._context(request, name)
        stream = TextStream(
            self._tokenizer,
            request.sampling.stop or (),
            min_tokens=request.sampling.min_new_tokens,
        )
        return Answer(context, row, stream, outbox)

    def check(self, request: Request, name: str) -> TextContext:
        """What a batch runs of such a request; its grammar is not looked at.

        Raises:
            InputError: as `make`.
        """
        self._row(request, name, None)
        return self._context(request, name)

    def _row(self, request: Request, name: str, grammar: GrammarState | None) -> Row:
        if not request.token_ids:
            raise InputError(f"{name} is empty; give at least one token")
        try:
            return make_row(
                request.sampling,
                request.token_ids,
                self.vocab_size,
                logit_bias=request.logit_bias,
                grammar=grammar,
                logprobs=request.logprobs,
            )
        except InputError as error:
            raise InputError(f"{name}: {error}") from error

    def _context(self, request: Request, name: str) -> TextContext:
        return make_context(
            self._model.read_prompt(self._hf, request.token_ids, request.images, name=name),
            request.sampling,
            name=name,
            max_length=self._max_length,
            vocab_size=self.vocab_size,
            eos_token_ids=self.eos_token_ids,
            has_grammar=request.grammar is not None,
        )

    def _grammar(self, grammar: Grammar | None) -> GrammarState | None:
        if grammar is None:
            return None
        with self._compiling:
            if self._grammars is None:
                self._grammars = GrammarCompiler(
                    self._tokenizer, self.vocab_size, sorted(self.eos_token_ids)
                )
            return self._grammars.compile(grammar).start()
