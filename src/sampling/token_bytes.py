"""The bytes that tokens stand for, parts of characters included."""

from __future__ import annotations

from collections.abc import Collection
from typing import TYPE_CHECKING

from llguidance import LLTokenizer

from unispec.errors import InputError

from .grammar import engine_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

__all__ = ["TokenBytes"]


class TokenBytes:
    """Looks up the bytes of tokens, one at a time.

    Args:
        tokenizer: the model's.
        vocab_size: V, the width of its logits.
        eos_token_ids: the ids that end a text, at least one.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerFast, vocab_size: int, eos_token_ids: Collection[int]
    ) -> None:
        self._tokenizer = tokenizer
        self._engine: LLTokenizer | None
        try:
            self._engine = engine_tokenizer(tokenizer, vocab_size, sorted(eos_token_ids))
        except InputError:  # its decoder does not tell
            self._engine = None

    def of(self, token: int) -> bytes | None:
        """The bytes of a token; None where they are not known."""
        return None if self._engine is None else bytes(self._engine.decode_bytes([token]))

    def text(self, token: int) -> str:
        """The text of a token alone; what is no whole character in it is replaced."""
        found = self.of(token)
        if found is None:
            return str(self._tokenizer.decode([token], skip_special_tokens=False))
        return found.decode("utf-8", "replace")
