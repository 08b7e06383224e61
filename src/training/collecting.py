"""The first stage: the target answers prompts, and the features that a draft reads are stored."""

from __future__ import annotations

import hashlib
import json
import logging
import time
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, Final, NamedTuple

from unispec.chat import encode_message
from unispec.errors import InputError

from .collection import Collection
from .own_prompts import MessageDelimiters, message_delimiters, write_prompts
from .prompts import built_in_prompts, check_prompts
from .seeds import seed_of
from .settings import CollectSettings
from .target import TorchTarget

__all__ = ["collect", "num_own_prompts"]

_LOGGER: Final = logging.getLogger(__name__)

SHARD_SIZE = 64
"""Sequences of a shard at most; they are answered as one batch."""

TEMPERATURES = (0.0, 0.7, 1.0)
"""Of a prompt's first answer in turn; a prompt that comes again takes one of the last two."""

HELD_OUT_EVERY = 10
"""Every tenth prompt is held out from the fit, from the first on; the target's own likewise."""


class _Question(NamedTuple):
    text: str
    token_ids: list[int]
    temperature: float
    held_out: bool


def collect(
    target: TorchTarget,
    prompts: Sequence[str] | None,
    settings: CollectSettings,
    folder: Path,
    *,
    shards: int | None = None,
    on_shard: Callable[[Collection], None] = lambda collection: None,
) -> Collection:
    """Lets the target answer prompts until there is enough; goes on where it was stopped.

    Prompts are answered in turn, first at temperatures 0, 0.7 and 1 in turn, later at the last two;
    every tenth prompt is held out, answered greedily and once. A prompt that is listed twice
    counts once. Of the target's own prompts each is answered once, and none that is listed.

    Args:
        prompts: at least two; None takes the built-in ones.
        folder: where the shards are, or will be.
        shards: collect nothing and read this many shards; None collects.
        on_shard: called with the collection at the start and after each shard.

    Raises:
        InputError: too few prompts, one that is too long or no text, no such layer, a target
            without chat template or with one in which it cannot write prompts, a target that
            computes NaN, no room on the disk, or a folder that was collected otherwise.
    """
    start = time.monotonic()
    check_prompts(prompts)
    settings.check(target.config)
    listed = built_in_prompts() if prompts is None else list(prompts)
    texts = list(dict.fromkeys(listed))
    token_ids = _encode(target, texts, settings.chat_template)
    target.check_length(max(map(len, token_ids)), settings.max_new_tokens)
    delimiters = _delimiters(target, settings, are_built_in=prompts is None)
    template = target.tokenizer.chat_template if settings.chat_template else None
    # Not of the tokens: some templates tell the date.
    digest = hashlib.sha256(json.dumps([listed, template]).encode()).hexdigest()[:16]
    identity: dict[str, Any] = {
        "model": str(Path(target.name).resolve()) if Path(target.name).is_dir() else target.name,
        "layers": list(settings.layers),
        "dtype": str(target.model.dtype).removeprefix("torch."),
        "sequences of a shard": SHARD_SIZE,
        "max_new_tokens": settings.max_new_tokens,
        "seed": settings.seed,
        "prompts": digest,
        "own prompts": delimiters is not None,
    }
    collection = Collection(folder, identity, shards)
    on_shard(collection)
    if shards is not None:
        return collection
    own = SHARD_SIZE // 2 if delimiters else 0
    posed = {*texts, *collection.prompts()}
    while not _enough(collection, settings, start):
        number = collection.num_shards
        questions = _listed(texts, token_ids, number, SHARD_SIZE - own)
        if delimiters:
            seed = seed_of("prompts", settings.seed, number)
            written = write_prompts(target, delimiters, own, seed)
            new = [text for text in written if text not in posed]
            questions += _own(target, new, len(posed) - len(texts))
            posed.update(new)
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


def num_own_prompts(collection: Collection, prompts: Sequence[str] | None) -> int:
    """How many of a collection's prompts the target has written.

    Args:
        prompts: those that were given to `collect`.
    """
    listed = built_in_prompts() if prompts is None else prompts
    return len({*collection.prompts()} - {*listed})


def _delimiters(
    target: TorchTarget, settings: CollectSettings, *, are_built_in: bool
) -> MessageDelimiters | None:
    """What the target needs to write prompts; None if it does not write any."""
    if settings.own_prompts:
        return message_delimiters(target)
    if settings.own_prompts is None and settings.chat_template and are_built_in:
        try:
            return message_delimiters(target)
        except InputError as error:
            _LOGGER.warning("Only the built-in prompts are posed. %s", error)
    return None


def _encode(target: TorchTarget, prompts: Sequence[str], chat_template: bool) -> list[list[int]]:
    """Encodes prompts up to where the answer begins.

    Raises:
        InputError: a chat template is wanted and there is none, or it refuses a prompt.
    """
    if not chat_template:
        return [list(target.tokenizer.encode(text)) for text in prompts]
    if not target.tokenizer.chat_template:
        raise InputError(
            f"{target.name}: its tokenizer has no chat template; use chat_template=False"
            " (--no-chat-template)"
        )
    return [encode_message(target.tokenizer, text) for text in prompts]


def _enough(collection: Collection, settings: CollectSettings, start: float) -> bool:
    if not collection.training or not collection.held_out:
        return False
    if settings.tokens is not None and collection.num_answer_tokens >= settings.tokens:
        return True
    return settings.seconds is not None and time.monotonic() - start >= settings.seconds


def _listed(
    texts: Sequence[str], token_ids: Sequence[list[int]], number: int, count: int
) -> list[_Question]:
    """What a shard asks of the listed prompts."""
    plan = islice(_plan(len(texts)), number * count, (number + 1) * count)
    return [
        _Question(texts[index], token_ids[index], temperature, index % HELD_OUT_EVERY == 0)
        for index, temperature in plan
    ]


def _own(target: TorchTarget, texts: Sequence[str], asked: int) -> list[_Question]:
    """What a shard asks of the target's own prompts, each once; `asked` came before."""
    plan = islice(_plan(asked + len(texts)), asked, asked + len(texts))
    return [
        _Question(
            text, encode_message(target.tokenizer, text), temperature, index % HELD_OUT_EVERY == 0
        )
        for text, (index, temperature) in zip(texts, plan, strict=True)
    ]


def _plan(num_prompts: int) -> Iterator[tuple[int, float]]:
    """Prompt and temperature of each answer, without end; a greedy answer comes once."""
    for prompt in range(num_prompts):
        held_out = prompt % HELD_OUT_EVERY == 0
        yield prompt, 0.0 if held_out else TEMPERATURES[prompt % len(TEMPERATURES)]
    sampled = TEMPERATURES[1:]
    turn = 0
    while True:
        for prompt in range(num_prompts):
            if prompt % HELD_OUT_EVERY:
                yield prompt, sampled[(prompt + turn) % len(sampled)]
        turn += 1
