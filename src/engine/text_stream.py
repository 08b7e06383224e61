"""Text of a request as its tokens arrive: whole characters only, cut before a stop string."""

from __future__ import annotations

from collections.abc import Sequence

from transformers import PreTrainedTokenizerFast

__all__ = ["TextStream"]

_UNFINISHED = "\N{REPLACEMENT CHARACTER}"


class TextStream:
    """Decodes one request's tokens incrementally.

    Args:
        stop: strings that end the text; the text is cut before the first of them.
        min_tokens: stop strings are looked for behind the text of so many tokens.

    Attributes:
        text: all text so far, what is held back included.
        stopped: whether a stop string was found.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerFast,
        stop: Sequence[str] = (),
        *,
        min_tokens: int = 0,
    ) -> None:
        self._tokenizer = tokenizer
        self._stop = [text for text in stop if text]
        self._longest = max(map(len, self._stop), default=0)
        self._min_tokens = min_tokens
        self._tokens: list[int] = []
        # Tokens before `_read` are in `text` already; those from `_context` on are decoded
        # again, because a token's text can depend on the one before it.
        self._context = 0
        self._read = 0
        self._emitted = 0
        # No stop string begins before this.
        self._searched = 0
        self.text = ""
        self.stopped = False

    def push(self, token: int) -> str:
        """Takes one token; returns the new text that is certain.

        Sets `stopped` when the text now holds a stop string.
        """
        self._tokens.append(token)
        before = self._decode(self._tokens[self._context : self._read])
        after = self._decode(self._tokens[self._context :])
        # A window without text would make the next word look like the text's first.
        if len(after) > len(before) and not after.endswith(_UNFINISHED):
            self.text += after[len(before) :]
            self._context, self._read = self._read, len(self._tokens)
        if len(self._tokens) <= self._min_tokens:
            self._searched = len(self.text)
            return self._release(len(self.text))
        found = [at for text in self._stop if (at := self.text.find(text, self._searched)) >= 0]
        if found:
            self.stopped = True
            self.text = self.text[: min(found)]
            return self._release(len(self.text))
        certain = self._certain()
        self._searched = certain
        return self._release(certain)

    def finish(self) -> str:
        """Returns what was held back, an unfinished character included."""
        if not self.stopped:
            before = self._decode(self._tokens[self._context : self._read])
            after = self._decode(self._tokens[self._context :])
            self.text += after[len(before) :]
        return self._release(len(self.text))

    def _release(self, end: int) -> str:
        new = self.text[self._emitted : end]
        self._emitted = max(end, self._emitted)
        return new

    def _certain(self) -> int:
        """Up to where no stop string begins that what follows may complete."""
        start = max(self._searched, len(self.text) - max(self._longest - 1, 0))
        end = self.text[start:]
        first = len(end)
        for text in self._stop:
            at = end.find(text[0], 0, first)
            while at >= 0 and not text.startswith(end[at:]):
                at = end.find(text[0], at + 1, first)
            if at >= 0:
                first = at
        return start + first

    def _decode(self, tokens: list[int]) -> str:
        return str(self._tokenizer.decode(tokens, skip_special_tokens=True)) if tokens else ""
