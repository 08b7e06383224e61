"""Answers in OpenAI's forms: whole ones, and the chunks of a stream."""

from __future__ import annotations

import time
import uuid
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

from max.pipelines.context import LogProbabilities

from .answering import Piece, Usage
from .asked import Asked
from .parameters import CHAT

__all__ = ["Form", "form_of"]

TokenText = Callable[[int], str]
"""The text of one token alone."""


@dataclass
class _Collected:
    """All pieces of one choice."""

    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[LogProbabilities] = field(default_factory=list)
    finish_reason: str | None = None

    def add(self, piece: Piece) -> None:
        self.text += piece.text
        self.token_ids += piece.token_ids
        self.logprobs += piece.logprobs
        self.finish_reason = piece.finish_reason


class Form(ABC):
    """What both interfaces share.

    Args:
        prompts: token ids of each prompt.
        token_text: for log probabilities.

    Attributes:
        asked: the request.
    """

    kind: str
    """What `object` names a whole answer."""
    chunk_kind: str
    """Likewise a chunk of a stream."""
    prefix: str
    """What ids begin with."""

    def __init__(
        self, asked: Asked, model: str, prompts: Sequence[Sequence[int]], token_text: TokenText
    ) -> None:
        self.asked = asked
        self._token_text = token_text
        self._prompts = prompts
        self._head = {
            "id": f"{self.prefix}-{uuid.uuid4().hex}",
            "created": int(time.time()),
            "model": model,
        }
        self._choices = [_Collected() for _ in range(len(prompts) * asked.n)]

    def add(self, piece: Piece) -> None:
        """Takes a piece of the whole answer."""
        self._choices[piece.index].add(piece)

    def whole(self, usage: Usage) -> dict[str, Any]:
        """The answer, when all pieces were added."""
        choices = [self._finished(at, choice) for at, choice in enumerate(self._choices)]
        return {**self._head, "object": self.kind, "choices": choices, "usage": usage.to_json()}

    def chunk(self, piece: Piece) -> dict[str, Any]:
        """A piece as the stream has it."""
        choice = self._streamed(piece)
        choice |= {"index": piece.index, "finish_reason": piece.finish_reason}
        if self.asked.return_token_ids:
            choice["token_ids"] = list(piece.token_ids)
        return self._chunk([choice])

    def usage_chunk(self, usage: Usage) -> dict[str, Any]:
        """The last chunk, if the usage is asked for."""
        return {**self._chunk([]), "usage": usage.to_json()}

    def first_chunks(self) -> list[dict[str, Any]]:
        """What a stream begins with."""
        return []

    def _chunk(self, choices: list[Any]) -> dict[str, Any]:
        chunk = {**self._head, "object": self.chunk_kind, "choices": choices}
        return chunk | {"usage": None} if self.asked.include_usage else chunk

    def _finished(self, index: int, choice: _Collected) -> dict[str, Any]:
        made = self._answered(choice)
        made |= {"index": index, "finish_reason": choice.finish_reason}
        if self.asked.return_token_ids:
            made["token_ids"] = choice.token_ids
            made["prompt_token_ids"] = list(self._prompts[index // self.asked.n])
        return made

    @abstractmethod
    def _answered(self, choice: _Collected) -> dict[str, Any]: ...

    @abstractmethod
    def _streamed(self, piece: Piece) -> dict[str, Any]: ...


class _Chat(Form):
    kind = "chat.completion"
    chunk_kind = "chat.completion.chunk"
    prefix = "chatcmpl"

    def first_chunks(self) -> list[dict[str, Any]]:
        """The role, before any text."""
        delta = {"role": "assistant", "content": ""}
        return [
            self._chunk([{"index": at, "delta": delta, "finish_reason": None, "logprobs": None}])
            for at in range(self.asked.n)
        ]

    def _answered(self, choice: _Collected) -> dict[str, Any]:
        message = {"role": "assistant", "content": choice.text, "refusal": None}
        return {"message": message, "logprobs": self._logprobs(choice.logprobs)}

    def _streamed(self, piece: Piece) -> dict[str, Any]:
        delta = {"content": piece.text} if piece.text else {}
        return {"delta": delta, "logprobs": self._logprobs(piece.logprobs)}

    def _logprobs(self, tokens: Sequence[LogProbabilities]) -> dict[str, Any] | None:
        if self.asked.logprobs is None:
            return None
        content = []
        for one in tokens:
            own = self._entry(one.sampled_token_ids[0], one.token_log_probabilities[0])
            entries = [self._entry(*pair) for pair in _most_probable(one, self.asked.logprobs)]
            content.append(own | {"top_logprobs": entries})
        return {"content": content, "refusal": None}

    def _entry(self, token: int, logprob: float) -> dict[str, Any]:
        text = self._token_text(token)
        # A part of a character has no bytes that its text would tell.
        known = "\N{REPLACEMENT CHARACTER}" not in text
        return {
            "token": text,
            "logprob": logprob,
            "bytes": list(text.encode()) if known else None,
        }


def _most_probable(one: LogProbabilities, count: int) -> list[tuple[int, float]]:
    """So many tokens and their log probabilities; MAX may have the token itself among them."""
    found = sorted(one.top_log_probabilities[0].items(), key=lambda pair: -pair[1])
    return found[:count]


class _Text(Form):
    kind = chunk_kind = "text_completion"
    prefix = "cmpl"

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self._offsets = [0] * len(self._choices)

    def _answered(self, choice: _Collected) -> dict[str, Any]:
        return {"text": choice.text, "logprobs": self._logprobs(choice.logprobs, 0)[0]}

    def _streamed(self, piece: Piece) -> dict[str, Any]:
        logprobs, end = self._logprobs(piece.logprobs, self._offsets[piece.index])
        self._offsets[piece.index] = end
        return {"text": piece.text, "logprobs": logprobs}

    def _logprobs(
        self, tokens: Sequence[LogProbabilities], offset: int
    ) -> tuple[dict[str, Any] | None, int]:
        if self.asked.logprobs is None:
            return None, offset
        texts = [self._token_text(one.sampled_token_ids[0]) for one in tokens]
        offsets = []
        for text in texts:
            offsets.append(offset)
            offset += len(text)
        top = []
        for one in tokens:
            named: dict[str, float] = {}
            for token, value in _most_probable(one, self.asked.logprobs):
                # Of tokens with the same text, such as parts of characters, the first counts.
                named.setdefault(self._token_text(token), value)
            top.append(named)
        values = list(chain.from_iterable(one.token_log_probabilities for one in tokens))
        found = {
            "tokens": texts,
            "token_logprobs": values,
            "top_logprobs": top,
            "text_offset": offsets,
        }
        return found, offset


def form_of(
    asked: Asked, model: str, prompts: Sequence[Sequence[int]], token_text: TokenText
) -> Form:
    """The form in which a request is answered."""
    return (_Chat if asked.path == CHAT else _Text)(asked, model, prompts, token_text)
