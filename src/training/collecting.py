"""The first stage: the target answers prompts, and what a draft reads of it is kept."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from unispec.chat import encode_message
from unispec.errors import InputError

from .collection import Collection
from .target import TorchTarget

__all__ = ["CollectSettings", "collect", "encode"]

SHARD = 64
"""Sequences of a shard, which are also a batch."""

TEMPERATURES = (0.0, 0.7, 1.0)

HELD_OUT = 10
"""Every so many prompts, the first included, are kept from the fit."""


@dataclass(frozen=True, kw_only=True)
class CollectSettings:
    """What is collected.

    Attributes:
        layers: target layers whose outputs are the features; none takes the final norm's.
        tokens: stop after so many tokens of answers; None does not.
        seconds: stop after so much time; None does not.
        max_new_tokens: longest answer.
        chat_template: whether prompts are posed as a user's messages.
        seed: of the sampling.
    """

    layers: tuple[int, ...] = ()
    tokens: int | None = None
    seconds: float | None = None
    max_new_tokens: int = 200
    chat_template: bool = True
    seed: int = 0


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
    every tenth prompt is held out, answered greedily and once. A prompt that comes again is left
    out.

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
    }
    collection = Collection(folder, identity, shards)
    on_shard(collection)
    if shards is not None:
        return collection
    while not _enough(collection, settings, start):
        number = collection.num_shards
        todo = list(islice(_plan(len(ids)), number * SHARD, (number + 1) * SHARD))
        answered = target.answers(
            [ids[prompt] for prompt, _ in todo],
            [temperature for _, temperature in todo],
            settings.layers,
            settings.max_new_tokens,
            settings.seed + number,
        )
        collection.add(answered, [prompt % HELD_OUT == 0 for prompt, _ in todo])
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
