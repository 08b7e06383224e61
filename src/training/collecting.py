"""The first stage: the target answers prompts, and what a draft reads of it is kept."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import cycle, islice
from pathlib import Path
from typing import Any, NamedTuple

from unispec.chat import encode_message
from unispec.errors import InputError

from .collection import Collection
from .own_prompts import write_prompts
from .target import TorchTarget

__all__ = ["CollectSettings", "collect", "encode"]

SHARD = 64
"""Sequences of a shard, which are also a batch."""

TEMPERATURES = (0.0, 0.7, 1.0)

HELD_OUT = 10
"""One of so many prompts is kept from the fit; of those given, the first and so on."""

SEEDS = 2**32
"""More than the command takes, so that prompts and answers are drawn apart."""


@dataclass(frozen=True, kw_only=True)
class CollectSettings:
    """What is collected.

    Attributes:
        layers: target layers whose outputs are the features; none takes the final norm's.
        tokens: stop after so many tokens of answers; None does not.
        seconds: stop after so much time; None does not.
        max_new_tokens: longest answer.
        chat_template: whether prompts are posed as a user's messages.
        own_prompts: whether the target writes half of the prompts itself.
        seed: of the sampling.
    """

    layers: tuple[int, ...] = ()
    tokens: int | None = None
    seconds: float | None = None
    max_new_tokens: int = 200
    chat_template: bool = True
    own_prompts: bool = False
    seed: int = 0


class _Question(NamedTuple):
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
    left out. Of the target's own a tenth is held out, wherever they come again.

    Args:
        target: answers.
        prompts: texts, at least two.
        settings: what to collect.
        folder: of the shards.
        shards: collect nothing, but take so many shards that are there; None collects.
        on_shard: called with the collection as it stands, also at the beginning.

    Raises:
        InputError: too few prompts, a target without chat template, no room on the disk, or a
            folder that was collected otherwise.
    """
    start = time.monotonic()
    ids = encode(target, list(dict.fromkeys(prompts)), settings.chat_template)
    digest = hashlib.sha256(repr(ids).encode()).hexdigest()[:16]
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
    while not _enough(collection, settings, start):
        number = collection.num_shards
        own = SHARD // 2 if settings.own_prompts else 0
        questions = _given(ids, number, SHARD - own)
        if own:
            questions += _own(target, own, settings.seed + number + SEEDS)
        answered = target.answers(
            [question.token_ids for question in questions],
            [question.temperature for question in questions],
            settings.layers,
            settings.max_new_tokens,
            settings.seed + number,
        )
        collection.add(answered, [question.held_out for question in questions])
        on_shard(collection)
    return collection


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


def _given(ids: Sequence[list[int]], number: int, count: int) -> list[_Question]:
    """What a shard asks of the prompts that were given."""
    plan = islice(_plan(len(ids)), number * count, (number + 1) * count)
    return [_Question(ids[prompt], heat, prompt % HELD_OUT == 0) for prompt, heat in plan]


def _own(target: TorchTarget, count: int, seed: int) -> list[_Question]:
    """Prompts that the target writes; whether one is held out depends on nothing but itself."""
    questions = []
    for text, heat in zip(write_prompts(target, count, seed), cycle(TEMPERATURES), strict=False):
        digest = hashlib.sha256(text.encode()).digest()
        held_out = int.from_bytes(digest[:8], "big") % HELD_OUT == 0
        token_ids = encode_message(target.tokenizer, text)
        questions.append(_Question(token_ids, 0.0 if held_out else heat, held_out))
    return questions


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
