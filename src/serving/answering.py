"""Answers as they come: pieces of each choice, in the order in which the worker makes them."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any

from max.pipelines.context import GenerationStatus, LogProbabilities

from unispec.engine.text_stream import TextStream
from unispec.pipelines.served.output import ServedOutput

from .asked import Asked
from .frontend import Choice
from .max_server import ModelWorker, Rejected, WorkerEnded
from .refusal import Refused
from .statistics import Meter, Places

__all__ = ["Piece", "Usage", "answer"]


@dataclass
class Piece:
    """What one step brought for one choice."""

    index: int
    """Of the choice, over all prompts."""
    text: str = ""
    """New text that is certain."""
    token_ids: Sequence[int] = ()
    """New tokens."""
    logprobs: Sequence[LogProbabilities] = ()
    """Of each new token, where they are asked for."""
    finish_reason: str | None = None
    """`"stop"` or `"length"` with the last piece."""


@dataclass
class Usage:
    """What a request used so far."""

    prompt_tokens: int = 0
    """Of all prompts."""
    cached_tokens: int = 0
    """Of these, in pages that were computed before."""
    completion_tokens: int = 0
    """Of all answers."""
    drafted: int = 0
    """Draft tokens that were verified."""
    accepted: int = 0
    """Of these, accepted."""

    def to_json(self) -> dict[str, Any]:
        """OpenAI's `usage`; drafts are counted as its predictions are."""
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "total_tokens": self.prompt_tokens + self.completion_tokens,
            "prompt_tokens_details": {"cached_tokens": self.cached_tokens},
            "completion_tokens_details": {
                "accepted_prediction_tokens": self.accepted,
                "rejected_prediction_tokens": self.drafted - self.accepted,
            },
        }


@dataclass
class _Merged:
    """The pieces of all choices of a request."""

    worker: ModelWorker
    usage: Usage
    places: Places
    pieces: asyncio.Queue[Piece | Exception | None] = field(default_factory=asyncio.Queue)

    async def run(self, index: int, choice: Choice, begun: asyncio.Event | None = None) -> bool:
        """Puts a choice's pieces into the queue, and a None or what went wrong behind them.

        Args:
            begun: of a prompt's first choice: is set with its first output, when the pages of the
                prompt can be shared, or when there is none.

        Returns:
            Whether all went well.
        """
        end: Exception | None = None
        try:
            async for piece in self._pieces(index, choice, begun):
                self.pieces.put_nowait(piece)
        except Exception as error:
            end = error
        self.pieces.put_nowait(end)
        if begun is not None:
            begun.set()
        return end is None

    async def _pieces(
        self, index: int, choice: Choice, begun: asyncio.Event | None
    ) -> AsyncGenerator[Piece, None]:
        context, text = choice.context, choice.text
        meter = Meter(self.places)
        try:
            async with aclosing(await self.worker.stream(context)) as source:
                async for output in source:
                    if begun is not None and not begun.is_set():
                        begun.set()
                        self.usage.cached_tokens += output.num_cached_tokens or 0
                    piece = _take(index, output, text)
                    self.usage.completion_tokens += len(piece.token_ids)
                    self.usage.drafted += output.drafted
                    self.usage.accepted += output.accepted
                    meter.took(len(piece.token_ids), output.drafted, output.accepted, output.source)
                    yield piece
                    if piece.finish_reason is not None:
                        return
        finally:
            meter.end()
        raise Refused("the answer ended early: the request was taken out", status=500)


def _take(index: int, output: ServedOutput, text: TextStream) -> Piece:
    """A step's piece, up to where a stop text ends the answer."""
    piece, taken = Piece(index), 0
    for token in output.tokens:
        taken += 1
        piece.text += text.push(token)
        if text.stopped:
            break
    piece.token_ids = output.tokens[:taken]
    piece.logprobs = (output.log_probabilities or [])[:taken]
    status = output.final_status
    if status is GenerationStatus.CANCELLED:
        raise Refused("a step failed; nothing more comes of this answer", status=500)
    if text.stopped or status.is_done:
        piece.text += text.finish()
        length = status is GenerationStatus.MAXIMUM_LENGTH and not text.stopped
        piece.finish_reason = "length" if length else "stop"
    return piece


async def answer(
    worker: ModelWorker,
    asked: Asked,
    prompts: Sequence[Sequence[Choice]],
    usage: Usage,
    places: Places,
) -> AsyncGenerator[Piece, None]:
    """All pieces of a request, the first one when the first token is there.

    Closing it takes out what has not ended.

    Args:
        prompts: the choices of each prompt.
        usage: counts on as pieces come.
        places: of these choices among those that wait.

    Raises:
        Refused: the worker cannot answer; says why, and with which status.
    """
    merged = _Merged(worker, usage, places)
    tasks = [
        asyncio.create_task(_answer_prompt(merged, number * len(choices), choices))
        for number, choices in enumerate(prompts)
    ]
    usage.prompt_tokens = sum(choices[0].context.tokens.prompt_length for choices in prompts)
    open_choices = asked.rows
    try:
        while open_choices:
            piece = await merged.pieces.get()
            if isinstance(piece, Exception):
                raise _refusal(piece, asked)
            if piece is None:
                open_choices -= 1
            else:
                yield piece
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _answer_prompt(merged: _Merged, first: int, choices: Sequence[Choice]) -> None:
    """Answers one prompt; further answers begin when the first has filled the prompt's pages."""
    begun = asyncio.Event()
    running = [asyncio.create_task(merged.run(first, choices[0], begun))]
    try:
        await begun.wait()
        if running[0].done() and not await running[0]:
            return
        running += [
            asyncio.create_task(merged.run(first + at, choice))
            for at, choice in enumerate(choices[1:], start=1)
        ]
        await asyncio.gather(*running)
    finally:
        for task in running:
            task.cancel()
        await asyncio.gather(*running, return_exceptions=True)


def _refusal(error: Exception, asked: Asked) -> Exception:
    if isinstance(error, Rejected):
        return Refused(str(error), param=asked.grammar_from)
    if isinstance(error, WorkerEnded):
        return Refused("the model's process has ended; the server stops", status=503)
    return error
