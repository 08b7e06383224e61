"""Grammars of requests, compiled in any thread of the model worker."""

from __future__ import annotations

import threading
from collections.abc import Set

from max.pipelines.context import TextContext
from transformers import PreTrainedTokenizerFast

from unispec.sampling.grammar import CompiledGrammar, Grammar, GrammarCompiler, GrammarState

from .max_serving import GrammarGate

__all__ = ["ServedGrammars"]


class ServedGrammars:
    """Compiles what contexts ask for; the compiler is made when the first one does.

    Args:
        vocab_size: V, the width of the logits.
        eos_token_ids: what may follow a complete text.

    Attributes:
        gate: what MAX's scheduler compiles with.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerFast, vocab_size: int, eos_token_ids: Set[int]
    ) -> None:
        self._arguments = (tokenizer, vocab_size, sorted(eos_token_ids))
        self._compiler: GrammarCompiler | None = None
        self._lock = threading.Lock()
        self.gate = GrammarGate(self._compile)

    def start(self, context: TextContext) -> GrammarState | None:
        """The grammar of a new request at its start, None if it has none.

        The scheduler has compiled it; a caller without one, such as `max generate`, lets it be
        compiled here.

        Raises:
            InputError: it cannot be compiled.
        """
        compiled = context.matcher
        if compiled is None and (context.grammar or context.json_schema is not None):
            compiled = self.gate.build_matcher(context.grammar, context.json_schema)
        return compiled.start() if isinstance(compiled, CompiledGrammar) else None

    def _compile(self, regex: str | None, schema: str | None) -> CompiledGrammar:
        if regex is not None:
            grammar = Grammar(kind="regex", text=regex)
        else:
            assert schema is not None
            grammar = Grammar(kind="json_schema", text=schema)
        with self._lock:
            if self._compiler is None:
                self._compiler = GrammarCompiler(*self._arguments)
            return self._compiler.compile(grammar)
