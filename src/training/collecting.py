"""The first stage: the target answers prompts, and what a draft reads of it is kept."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

from unispec.chat import encode_message
from unispec.errors import InputError

from .collection import Collection
from .own_prompts import message_marks, write_prompts
from .seeds import seed_of
from .target import TorchTarget

__all__ = ["CollectSettings", "collect", "encode", "num_own_prompts"]

SHARD = 64
"""Most sequences of a shard, which are also a batch."""

TEMPERATURES = (0.0, 0.7, 1.0)

HELD_OUT = 10
"""One of so many prompts is kept from the fit: the first and so on, and likewise of its own."""


@dataclass(frozen=True, kw_only=True)
class CollectSettings:
    """What is collected.

    Attributes:
        layers: target layers whose outputs are the features; none takes the final norm's.
        tokens: stop after so many tokens of answers; None does not.
        seconds: stop after so much time; None does not.
        max_new_tokens: longest answer.
        chat_template: whether prompts are posed as a user's messages.
        own_prompts: whether the target writes up to half of the prompts itself.
        seed: of the sampling.

    Raises:
        InputError: own prompts without chat template.
    """

    layers: tuple[int, ...] = ()
    tokens: int | None = None
    seconds: float | None = None
    max_new_tokens: int = 200
    chat_template: bool = True
    own_prompts: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        if self.own_prompts and not self.chat_template:
            raise InputError(
                "own prompts need the chat template, for it begins a message: use --no-own-prompts"
            )


class _Prompt(NamedTuple):
    text: str
    token_ids: list[int]


class _Question(NamedTuple):
    text: str
    token_ids: list[int]
    temperature: float
    held_out: bool


def collect(
    target: TorchTarget,
    prompts: Sequence[str],
    settings: CollectSettings,
    folder: Path,
    *,
    shards: int | None = None,
    on_shard: Callable[[Collection], None] = lambda collection: None,
) -> Collection:
    """Lets the target answer prompts until there is enough; goes on where it was stopped.

    Prompts are answered in turn, first at temperatures 0, 0.7 and 1 in turn, later at the last two;
    every tenth prompt is held out, answered greedily and once. A given prompt that comes again is
    left out. Of the target's own prompts each is answered once, and none that was given.

    Args:
        target: answers.
        prompts: texts, at least two.
        settings: what to collect.
        folder: of the shards.
        shards: collect nothing, but take so many shards that are there; None collects.
        on_shard: called with the collection as it stands, also at the beginning.

    Raises:
        InputError: too few prompts, a target without chat template or with one in which it cannot
            write prompts, a target that computes NaN, no room on the disk, or a folder that was
            collected otherwise.
    """
    start = time.monotonic()
    texts = list(dict.fromkeys(prompts))
    ids = encode(target, texts, settings.chat_template)
    given = [_Prompt(*one) for one in zip(texts, ids, strict=True)]
    marks = message_marks(target) if settings.own_prompts else None
    template = target.tokenizer.chat_template if settings.chat_template else None
    # Not of the tokens: some templates tell the date.
    digest = hashlib.sha256(json.dumps([list(prompts), template]).encode()).hexdigest()[:16]
    identity: dict[str, Any] = {
        "model": str(Path(target.name).resolve()) if Path(target.name).is_dir() else target.name,
        "layers": list(settings.layers),
        "dtype": str(target.model.dtype).removeprefix("torch."),
        "sequences of a shard": SHARD,
        "max_new_tokens": settings.max_new_tokens,
        "seed": settings.seed,
        "prompts": digest,
        "own prompts": settings.own_prompts,
    }
    collection = Collection(folder, identity, shards)
    on_shard(collection)
    if shards is not None:
        return collection
    own = SHARD // 2 if marks else 0
    posed = {*texts, *collection.prompts()}
    while not _enough(collection, settings, start):
        number = collection.num_shards
        questions = _given(given, number, SHARD - own)
        if marks:
            seed = seed_of("prompts", settings.seed, number)
            written = write_prompts(target, marks, own, seed)
            new = [
                _Prompt(text, encode_message(target.tokenizer, text))
                for text in written
                if text not in posed
            ]
            questions += _own(new, len(posed) - len(texts))
            posed.update(prompt.text for prompt in new)
        answered = target.answers(
            [question.token_ids for question in questions],
            [question.temperature for question in questions],
            settings.layers,
            settings.max_new_tokens,
            seed_of("answers", settings.seed, number),
        )
        collection.add(
            [question.text for question in questions],
            answered,
            [question.held_out for question in questions],
        )
        on_shard(collection)
    return collection


def num_own_prompts(collection: Collection, given: Sequence[str]) -> int:
    """How many of a collection's prompts the target has written.

    Args:
        collection: of answers.
        given: the other prompts.
    """
    return len({*collection.prompts()} - {*given})


def encode(target: TorchTarget, prompts: Sequence[str], chat_template: bool) -> list[list[int]]:
    """The prompts' tokens, up to the answer.

    Raises:
        InputError: fewer than two prompts, or a chat template is wanted and there is none, or
            it refuses a prompt.
    """
    if len(prompts) < 2:
        raise InputError(
            f"{len(prompts)} prompts were given; one is held out, so give at least two"
        )
    if not chat_template:
        return [list(target.tokenizer.encode(text)) for text in prompts]
    if not target.tokenizer.chat_template:
        raise InputError(
            f"{target.name}: its tokenizer has no chat template; use --no-chat-template"
        )
    return [encode_message(target.tokenizer, text) for text in prompts]


def _enough(collection: Collection, settings: CollectSettings, start: float) -> bool:
    if not collection.training or not collection.held_out:
        return False
    if settings.tokens is not None and collection.num_answer_tokens >= settings.tokens:
        return True
    return settings.seconds is not None and time.monotonic() - start >= settings.seconds


def _given(prompts: Sequence[_Prompt], number: int, count: int) -> list[_Question]:
    """What a shard asks of the prompts that were given."""
    plan = islice(_plan(len(prompts)), number * count, (number + 1) * count)
    return [_Question(*prompts[index], heat, index % HELD_OUT == 0) for index, heat in plan]


def _own(prompts: Sequence[_Prompt], asked: int) -> list[_Question]:
    """What a shard asks of the target's own prompts, which come once; `asked` came before."""
    plan = islice(_plan(asked + len(prompts)), asked, asked + len(prompts))
    return [_Question(*prompts[index - asked], heat, index % HELD_OUT == 0) for index, heat in plan]


def _plan(num_prompts: int) -> Iterator[tuple[int, float]]:
    """Prompt and temperature of each answer, without end; a greedy answer comes once."""
    for prompt in range(num_prompts):
        held_out = prompt % HELD_OUT == 0
        yield prompt, 0.0 if held_out else TEMPERATURES[prompt % len(TEMPERATURES)]
    sampled = TEMPERATURES[1:]
    turn = 0
    while True:
        for prompt in range(num_prompts):
            if prompt % HELD_OUT:
                yield prompt, sampled[(prompt + turn) % len(sampled)]
        turn += 1
