"""Adapter to parts of MAX without public API: what its scheduler asks a pipeline for.

Written against max 26.7.0. `tests/test_max_contract.py` says which name moved.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

from max.pipelines.context import TextContext
from max.pipelines.lib.pipeline_variants.utils import StructuredOutputHelper
from max.pipelines.speculative.utils import _SpeculativeDecodingMetrics

__all__ = ["GrammarGate", "SpecDecodeMetrics", "without_stopwatch"]

SpecDecodeMetrics = _SpeculativeDecodingMetrics
"""What a step verified: `num_speculative_tokens`, `accepted_per_position`, `num_verifications`."""

_GENERATE = "max._entrypoints.cli.generate"


class GrammarGate(StructuredOutputHelper):
    """What MAX's `AsyncGrammarGate` compiles grammars with, in its own threads.

    The scheduler finds it as the pipeline's `_structured_output`. What `compile_grammar` raises
    is the answer to the request.

    Args:
        compile_grammar: `(regex, schema)` to a compiled grammar; one of them is None.
    """

    def __init__(self, compile_grammar: Callable[[str | None, str | None], Any]) -> None:
        super().__init__(
            enabled=True,
            enable_response_format_schema=True,
            # The gate asks for nothing of it but a name for its messages.
            backend=SimpleNamespace(name="llguidance"),
        )
        self._compile_grammar = compile_grammar

    def build_matcher(self, grammar: str | None, json_schema: str | None) -> Any:
        """Compiles a request's grammar; `grammar` comes first where both are given."""
        return self._compile_grammar(grammar, None if grammar else json_schema)

    def install_matcher(self, context: TextContext, matcher: Any) -> None:
        """Leaves a compiled grammar in the context, where the pipeline finds it."""
        context.set_matcher(matcher)


def without_stopwatch(processors: Sequence[Any] | None) -> list[Any]:
    """Logits processors but for the one with which `max generate` counts tokens.

    That one does not look at logits, which this graph keeps to itself.
    """
    command = sys.modules.get(_GENERATE)
    stopwatch = () if command is None else (command.TrackMetrics,)
    return [one for one in processors or () if not isinstance(one, stopwatch)]
