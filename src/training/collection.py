"""Collected answers on disk: shards of tokens and features, read where they lie.

A shard is one safetensors file: `tokens` int32 `[T]` and `features` float16 `[T, F]` of all its
sequences one after the other, `lengths` and `prompt_lengths` int32 `[S]`, `held_out` uint8 `[S]`;
the metadata's `prompts` are their texts in JSON.
A file appears under its name only when it is complete, so a kill leaves whole shards.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from unispec.errors import InputError

from .target import Answered

__all__ = ["Collected", "Collection", "Place", "make_folder", "write_whole"]

_SETTINGS = "collection.json"


@dataclass(frozen=True)
class Collected:
    """A prompt with its answer, and the target's features of it."""

    tokens: Tensor
    """int64 `[T]`."""
    features: Tensor
    """float32 `[T, F]`; the last row is zero and not read."""
    prompt_length: int
    """Tokens before the answer."""


@dataclass(frozen=True)
class Place:
    """Where a sequence lies."""

    shard: Path
    """The file."""
    start: int
    """Tokens before it in the file."""
    length: int
    """Its tokens."""
    prompt_length: int
    """Those before its answer."""


class Collection:
    """A folder of shards.

    Args:
        folder: created if it does not exist.
        settings: what the shards are made with.
        shards: read so many and leave the rest; None reads all.

    Attributes:
        folder: where the shards are.
        settings: what they are made with.
        training: sequences to learn from.
        held_out: greedy answers to other prompts, to measure with.
        num_answer_tokens: tokens of all answers.
        num_shards: complete shards.

    Raises:
        InputError: the folder holds shards made with other settings, a damaged shard, or fewer
            than asked for; or it cannot be made.
    """

    def __init__(
        self, folder: Path, settings: Mapping[str, Any], shards: int | None = None
    ) -> None:
        self.folder, self.settings = folder, dict(settings)
        make_folder(folder)
        path = folder / _SETTINGS
        if path.is_file():
            found = json.loads(path.read_text())
            for name, value in settings.items():
                if found.get(name) != value:
                    raise InputError(
                        f"{folder} was collected with {name} {found.get(name)!r}, not"
                        f" {value!r}: give the same again, or another folder"
                    )
        else:
            write_whole(path, lambda part: part.write_text(json.dumps(settings, indent=2)))
        self.training: list[Place] = []
        self.held_out: list[Place] = []
        self.num_answer_tokens = 0
        self.num_shards = 0
        self._index_more(shards)
        if shards is not None and self.num_shards < shards:
            raise InputError(
                f"{folder} has {self.num_shards} of the {shards} shards that the fit began with:"
                " give that folder again, or another --output"
            )

    def add(
        self, prompts: Sequence[str], answered: Sequence[Answered], held_out: Sequence[bool]
    ) -> None:
        """Writes the next shard.

        Args:
            prompts: texts of its prompts.
            answered: its sequences.
            held_out: which of them are not to be learnt from.

        Raises:
            InputError: there is no room on the disk.
        """
        int32 = torch.int32
        tensors = {
            "tokens": torch.tensor(
                [token for one in answered for token in one.tokens], dtype=int32
            ),
            "features": torch.cat([one.features for one in answered]),
            "lengths": torch.tensor([len(one.tokens) for one in answered], dtype=int32),
            "prompt_lengths": torch.tensor([one.prompt_length for one in answered], dtype=int32),
            "held_out": torch.tensor(list(held_out), dtype=torch.uint8),
        }
        shard = self._shard(self.num_shards)
        content = save(tensors, {"prompts": json.dumps(list(prompts))})
        write_whole(shard, lambda part: part.write_bytes(content))
        # Behind one that was damaged and deleted, others may lie.
        self._index_more(None)

    def read(self, place: Place) -> Collected:
        """One sequence of `training` or `held_out`, from where it lies on the disk."""
        end = place.start + place.length
        with safe_open(place.shard, framework="pt") as tensors:
            return Collected(
                tokens=tensors.get_slice("tokens")[place.start : end].long(),
                features=tensors.get_slice("features")[place.start : end].float(),
                prompt_length=place.prompt_length,
            )

    def prompts(self) -> Iterator[str]:
        """Texts of the prompts of all sequences, shard by shard."""
        for number in range(self.num_shards):
            with safe_open(self._shard(number), framework="pt") as tensors:
                yield from json.loads(tensors.metadata()["prompts"])

    def count_tokens(self, vocab_size: int) -> Tensor:
        """How often each token stands in the answers to learn from, int64 `[V]`."""
        counts = torch.zeros(vocab_size, dtype=torch.long)
        for place in self.training:
            with safe_open(place.shard, framework="pt") as tensors:
                begin, end = place.start + place.prompt_length, place.start + place.length
                answer = tensors.get_slice("tokens")[begin:end].long()
            counts += torch.bincount(answer, minlength=vocab_size)
        return counts

    def _shard(self, number: int) -> Path:
        return self.folder / f"shard-{number:05d}.safetensors"

    def _index_more(self, limit: int | None) -> None:
        while limit is None or self.num_shards < limit:
            shard = self._shard(self.num_shards)
            if not shard.is_file():
                return
            self._index(shard)

    def _index(self, shard: Path) -> None:
        try:
            with safe_open(shard, framework="pt") as tensors:
                names = ("lengths", "prompt_lengths", "held_out")
                columns = [tensors.get_tensor(name).tolist() for name in names]
        except SafetensorError as error:
            raise InputError(f"{shard} is damaged ({error}): delete it and resume") from error
        start = 0
        for length, prompt_length, held_out in zip(*columns, strict=True):
            place = Place(shard, start, length, prompt_length)
            (self.held_out if held_out else self.training).append(place)
            self.num_answer_tokens += length - prompt_length
            start += length
        self.num_shards += 1


def make_folder(folder: Path) -> None:
    """Makes a folder and those that it lies in.

    Raises:
        InputError: it cannot be made.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{folder} cannot be made ({error.strerror}): give another") from error


def write_whole(path: Path, write: Callable[[Path], object]) -> None:
    """Writes a file that is either complete under its name or not there.

    Args:
        path: the file.
        write: writes to the path that it is given.

    Raises:
        InputError: there is no room on the disk, or it cannot be written for another reason.
    """
    part = path.with_name(path.name + ".part")
    try:
        write(part)
        os.replace(part, path)
    except OSError as error:
        part.unlink(missing_ok=True)
        raise InputError(
            f"{path} cannot be written ({error.strerror or error}): make room, or give another"
            " folder; then resume"
        ) from error
