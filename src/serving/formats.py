"""Answers in OpenAI's forms: whole ones, and the chunks of a stream."""

from __future__ import annotations

import time
import uuid
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

from max.pipelines.context import LogProbabilities

from .answering import Piece, Usage
from .asked import Asked
from .frontend import Choice, Frontend
from .parameters import CHAT

__all__ = ["Form", "form_of"]


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
        prompts: the choices of each prompt.
        frontend: knows the tokens of log probabilities.

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
        self,
        asked: Asked,
        model: str,
        prompts: Sequence[Sequence[Choice]],
        frontend: Frontend,
    ) -> None:
        self.asked = asked
        self._frontend = frontend
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
            made["prompt_token_ids"] = self._prompt(index)
        return made

    def _prompt(self, index: int) -> list[int]:
        """Token ids of the prompt of a choice."""
        (first, *_) = self._prompts[index // self.asked.n]
        return [int(token) for token in first.context.tokens.prompt]

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
        known = self._frontend.token_bytes
        found = known.of(token)
        return {
            "token": known.text(token),
            "logprob": logprob,
            "bytes": None if found is None else list(found),
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
        text_of = self._frontend.token_bytes.text
        texts = [text_of(one.sampled_token_ids[0]) for one in tokens]
        offsets = []
        for text in texts:
            offsets.append(offset)
            offset += len(text)
        top = []
        for one in tokens:
            named: dict[str, float] = {}
            own = (one.sampled_token_ids[0], one.token_log_probabilities[0])
            for token, value in (*_most_probable(one, self.asked.logprobs), own):
                # Of tokens with the same text, such as parts of characters, the first counts.
                named.setdefault(text_of(token), value)
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
    asked: Asked, model: str, prompts: Sequence[Sequence[Choice]], frontend: Frontend
) -> Form:
    """The form in which a request is answered."""
    return (_Chat if asked.path == CHAT else _Text)(asked, model, prompts, frontend)
