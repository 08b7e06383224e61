"""Which tokens a grammar allows: JSON schemas and regexes as bitmasks.

The engine is `llguidance`; this module gives it the tokenizer's true bytes
and turns its matcher into the rows of masks that verifying a draft needs.
"""

from __future__ import annotations

import copy
import json
import logging
import re
import reprlib
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Final, Literal, TypeAlias, get_args

import numpy as np
import numpy.typing as npt
from llguidance import LLMatcher, LLParserLimits, LLTokenizer
from llguidance.numpy import fill_next_token_bitmask

from unispec.errors import InputError

from .json_schema import rewrite_schema

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

__all__ = [
    "CompiledGrammar",
    "Grammar",
    "GrammarCompiler",
    "GrammarState",
    "engine_tokenizer",
]

logger = logging.getLogger(__name__)

_CACHED_GRAMMARS = 64

_STACK_BYTES = 512 << 20  # of addresses; memory is taken as it is used
_STACK_LOCK = threading.Lock()

_PROBE = "to be, or not to be"

_BYTE_LEVEL_DECODER = {
    "type": "ByteLevel",
    "add_prefix_space": False,
    "trim_offsets": False,
    "use_regex": False,
}


_Kind: TypeAlias = Literal["json_schema", "regex"]
_KINDS: Final = get_args(_Kind)


@dataclass(frozen=True)
class Grammar:
    """What a request's whole output has to match.

    Attributes:
        kind: how `text` is read.
        text: a JSON schema (a JSON object) or a regex in the syntax of Rust's
            `regex` crate, which the whole output matches from end to end. What a
            schema decides on the order of keys says the section "Grammars" of
            docs/getting-started.md.

    Raises:
        InputError: another kind, or a text that is no string, such as a schema as a dict.
    """

    kind: _Kind
    text: str

    def __post_init__(self) -> None:
        if self.kind not in _KINDS:
            raise InputError(f"the grammar's kind is {self.kind!r}; choose {' or '.join(_KINDS)}")
        if not isinstance(self.text, str):
            raise InputError(
                f"the grammar's text is a {type(self.text).__name__}; give a string, a schema as"
                " json.dumps(schema)"
            )


class GrammarCompiler:
    """Compiles grammars for one tokenizer and one width of logits.

    Args:
        tokenizer: the model's fast tokenizer.
        vocab_size: width V of the model's logits. Ids that no token has, and tokens
            from V on, are never allowed.
        eos_token_ids: the ids that end a text, at least one.

    Raises:
        InputError: the tokenizer is not a fast one, or has tokens whose bytes are unknown.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerFast,
        vocab_size: int,
        eos_token_ids: Sequence[int],
    ) -> None:
        self._vocabulary = _Vocabulary(vocab_size, eos_token_ids)
        self._tokenizer = engine_tokenizer(tokenizer, vocab_size, eos_token_ids)
        self._compiled: dict[Grammar, CompiledGrammar] = {}

    def compile(self, grammar: Grammar) -> CompiledGrammar:
        """Compiles a grammar, or returns the one compiled before.

        Raises:
            InputError: the schema or regex is malformed, uses a feature that
                cannot be enforced, or matches no text of this tokenizer.
        """
        compiled = self._compiled.get(grammar)
        if compiled is None:
            compiled = self._compile(grammar)
            if len(self._compiled) == _CACHED_GRAMMARS:
                del self._compiled[next(iter(self._compiled))]
            self._compiled[grammar] = compiled
        return compiled

    def _compile(self, grammar: Grammar) -> CompiledGrammar:
        try:
            definitions = _engine_grammars(grammar)
        except ValueError as error:
            raise _unusable(grammar, str(error)) from error
        reason = "it matches no text that this tokenizer can write"
        for definition in definitions:
            matcher = _on_a_deep_stack(partial(self._matcher, definition))
            compiled = CompiledGrammar(matcher, self._vocabulary)
            if matcher.is_error():
                reason = _reason(matcher.get_error())
                continue
            if compiled.start().is_stuck:
                continue
            # What one text builds stays for the next, and the engine has room for so much only.
            second = compiled.start()
            if not second.is_stuck:
                return compiled
            reason = _reason(second.error or reason)
        raise _unusable(grammar, reason)

    def _matcher(self, definition: str) -> LLMatcher:
        limits = LLParserLimits(verbose_errors=False)
        return LLMatcher(self._tokenizer, definition, log_level=0, limits=limits)


class CompiledGrammar:
    """A grammar at its start; made by `GrammarCompiler.compile`."""

    def __init__(self, matcher: LLMatcher, vocabulary: _Vocabulary) -> None:
        self._matcher = matcher
        self._vocabulary = vocabulary

    def start(self) -> GrammarState:
        """Returns the state of a request that has emitted nothing."""
        return GrammarState(self._matcher.deep_copy(), self._vocabulary)


class GrammarState:
    """How far one request's output has come in its grammar.

    A token is allowed if the grammar can continue the text with it; where the
    grammar leaves only one continuation, its canonical token alone may be allowed.
    EOS is allowed exactly where the text so far matches the grammar as a whole.
    The one exception is a dead end, a text that the grammar would continue but
    no token of the tokenizer can, or that the engine finds too complex: only EOS
    is allowed there, as no mask may be empty, and a warning is logged.
    """

    def __init__(self, matcher: LLMatcher, vocabulary: _Vocabulary) -> None:
        self._matcher = matcher
        self._vocabulary = vocabulary
        self._ended = False
        self._allowed: npt.NDArray[np.int32] | None = None  # [ceil(V/32)]

    @property
    def eos_token_ids(self) -> frozenset[int]:
        """The ids that end a text."""
        return self._vocabulary.eos_token_ids

    @property
    def is_complete(self) -> bool:
        """Whether nothing but EOS may follow."""
        return np.array_equal(self._mask(), self._vocabulary.eos_mask)

    @property
    def is_stuck(self) -> bool:
        """Whether the text does not match and no token can continue it (a dead end)."""
        return self.is_complete and not (self._ended or self._matcher.is_accepting())

    @property
    def error(self) -> str | None:
        """What the engine says where it gave up; None where it has not."""
        return str(self._matcher.get_error()) if self._matcher.is_error() else None

    def fill_bitmask(self, bitmask: npt.NDArray[np.int32], draft_tokens: Sequence[int]) -> None:
        """Writes the tokens allowed at each verified position; changes no state.

        Row j is the mask after the accepted tokens and `draft_tokens[:j]`. Bit
        i of word w is token 32 * w + i, set where allowed; bits from V on are
        zero. Rows behind a draft that is not allowed are all ones, since nothing
        emitted can depend on them.

        Args:
            bitmask: int32 `[K + 1, ceil(V / 32)]`, overwritten.
            draft_tokens: the K proposed tokens; -1 is a void draft, never allowed.

        Raises:
            ValueError: `bitmask` has another shape or dtype.
        """
        shape = (len(draft_tokens) + 1, self._vocabulary.words)
        if bitmask.shape != shape or bitmask.dtype != np.int32:
            raise ValueError(f"bitmask is {bitmask.dtype}{bitmask.shape}, not int32{shape}")
        bitmask[0] = self._mask()
        walker = self._copy()
        for row, draft in enumerate(draft_tokens, start=1):
            if not walker._allows(draft):
                bitmask[row:] = self._vocabulary.full_mask
                return
            walker._advance(draft)
            bitmask[row] = walker._mask()

    def accept(self, token: int) -> None:
        """Advances by one emitted token.

        Raises:
            ValueError: the mask does not allow `token`; the state is unchanged.
        """
        if not self._allows(token):
            raise ValueError(f"token {token} is not allowed by the grammar here")
        if token in self._vocabulary.eos_token_ids and self.is_stuck:
            logger.warning("A text ends before its grammar does: no token can continue it.")
        self._advance(token)

    def _copy(self) -> GrammarState:
        other = copy.copy(self)
        other._matcher = self._matcher.deep_copy()
        return other

    def _allows(self, token: int) -> bool:
        if not 0 <= token < self._vocabulary.size:
            return False
        return bool(self._mask()[token >> 5] >> (token & 31) & 1)

    def _advance(self, token: int) -> None:
        if token in self._vocabulary.eos_token_ids:
            self._ended = True
        elif self._matcher.try_consume_tokens([token]) != 1:
            logger.warning("The grammar engine gave up: %s", self._matcher.get_error())
            self._ended = True
        self._allowed = None

    def _mask(self) -> npt.NDArray[np.int32]:
        if self._allowed is None:
            self._allowed = self._vocabulary.eos_mask if self._ended else self._compute_mask()
        return self._allowed

    def _compute_mask(self) -> npt.NDArray[np.int32]:
        eos_mask = self._vocabulary.eos_mask
        mask = np.empty_like(eos_mask)
        fill_next_token_bitmask(self._matcher, mask[np.newaxis])
        # An EOS that is not a special token could otherwise pass as plain text.
        mask &= ~eos_mask
        if self._matcher.is_accepting():
            mask |= eos_mask
        return mask if mask.any() else eos_mask


class _Vocabulary:
    """The token ids of a model, and the two masks that need no grammar."""

    def __init__(self, size: int, eos_token_ids: Sequence[int]) -> None:
        if not eos_token_ids or not all(0 <= token < size for token in eos_token_ids):
            raise InputError(
                f"EOS token ids {list(eos_token_ids)} do not suit a vocabulary of {size}; "
                "a grammar needs at least one, each below the vocabulary size."
            )
        self.size = size
        self.words = -(-size // 32)
        self.eos_token_ids = frozenset(eos_token_ids)
        self.eos_mask = self._pack(list(eos_token_ids))  # [words]
        self.full_mask = self._pack(slice(size))  # [words]

    def _pack(self, tokens: list[int] | slice) -> npt.NDArray[np.int32]:
        allowed = np.zeros(self.words * 32, dtype=np.bool_)
        allowed[tokens] = True
        mask = np.packbits(allowed, bitorder="little").view(np.int32)
        mask.flags.writeable = False
        return mask


def engine_tokenizer(
    tokenizer: PreTrainedTokenizerFast, vocab_size: int, eos_token_ids: Sequence[int]
) -> LLTokenizer:
    """Builds the engine's tokenizer and checks that it knows the tokens' bytes.

    Raises:
        InputError: the tokenizer is not a fast one, or has tokens whose bytes are unknown.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise InputError(
            f"{type(tokenizer).__name__} is not a fast tokenizer; a grammar needs a model "
            "with a tokenizer.json."
        )
    try:
        definition = _definition(backend.to_str(), vocab_size)
        engine = LLTokenizer(definition, vocab_size, list(eos_token_ids))
        round_trips = engine.decode_str(engine.tokenize_str(_PROBE)) == _PROBE
    except ValueError:
        round_trips = False
    if not round_trips:
        raise InputError(
            f"The bytes of the tokens of {type(tokenizer).__name__} cannot be told from its "
            "decoder; a grammar needs a byte-level or byte-fallback tokenizer."
        )
    return engine


def _definition(tokenizer_json: str, vocab_size: int) -> str:
    """Returns the tokenizer.json from which the engine reads the bytes of tokens."""
    definition: dict[str, Any] = json.loads(tokenizer_json)
    definition |= {"padding": None, "truncation": None, "post_processor": None}
    _drop_tokens_from(vocab_size, definition)
    # The engine takes the first decoder it knows; in tokenizers converted from
    # GGUF that is a byte fallback which their byte-level tokens never use.
    if '"type":"ByteLevel"' in json.dumps(definition["decoder"], separators=(",", ":")):
        definition["decoder"] = _BYTE_LEVEL_DECODER
    # Bytes without a token must be a dead end, not the unknown token.
    if definition["model"]["type"] == "BPE":
        definition["model"]["unk_token"] = None
    return json.dumps(definition)


def _drop_tokens_from(first: int, definition: dict[str, Any]) -> None:
    """Leaves out tokens that the model has no logits for."""
    definition["added_tokens"] = [
        token for token in definition["added_tokens"] if token["id"] < first
    ]
    model = definition["model"]
    if isinstance(model["vocab"], list):
        model["vocab"] = model["vocab"][:first]
        return
    kept = {token: number for token, number in model["vocab"].items() if number < first}
    if len(kept) < len(model["vocab"]) and "merges" in model:
        model["merges"] = [
            (left, right)
            for left, right in model["merges"]
            if {left, right, left + right} <= kept.keys()
        ]
    model["vocab"] = kept


def _engine_grammars(grammar: Grammar) -> list[str]:
    """Translates to the engine's own format; the first that it can compile is to be taken.

    Raises:
        ValueError: it cannot be enforced; the text says why.
    """
    if grammar.kind == "regex":
        return [LLMatcher.grammar_from_regex(grammar.text)]
    return [_json_grammar(schema) for schema in rewrite_schema(grammar.text)]


def _json_grammar(schema: str) -> str:
    # Overrides win over the schema's own "x-guidance". Each run of whitespace is
    # bounded, or a looping model could write blanks for ever. Without escapes by number
    # a key has one writing, so that no declared one passes as another.
    return LLMatcher.grammar_from_json_schema(
        schema,
        overrides={
            "whitespace_flexible": True,
            "whitespace_pattern": r"[ \t\n\r]{1,16}",
            "coerce_one_of": False,
            "lenient": False,
            "json_allowed_escapes": 'nrbtf\\"',
        },
    )


def _on_a_deep_stack(make: Callable[[], LLMatcher]) -> LLMatcher:
    """Runs what recurses over a schema where there is room for the largest that it reads.

    The engine takes up to 50,000 steps into a schema, which need 220 MB; a thread's
    usual 8 MB end the process.
    """
    with ThreadPoolExecutor(max_workers=1) as pool:
        with _STACK_LOCK:
            usual = threading.stack_size(_STACK_BYTES)
            try:
                made = pool.submit(make)
            finally:
                threading.stack_size(usual)
        return made.result()


def _unusable(grammar: Grammar, reason: str) -> InputError:
    """Names the grammar, what is wrong with it, and what would be right."""
    name, fix = {
        "json_schema": (
            "JSON schema",
            "give a JSON Schema object of keywords that can be enforced",
        ),
        "regex": ("regex", "give one in Rust syntax, without look-around and back-references"),
    }[grammar.kind]
    return InputError(f"The {name} {reprlib.repr(grammar.text)} cannot be used: {reason}; {fix}.")


def _reason(message: str) -> str:
    """Picks the cause out of the engine's message of several lines."""
    cause = re.search(r"^error: (.+)$", message, re.MULTILINE)
    if cause is not None:
        return cause[1]
    if "coerce_one_of" in message:
        return "it has a oneOf whose parts may match the same text; anyOf can be enforced"
    return message.splitlines()[0].rpartition("(in regex): ")[2]
