"""Collected answers on disk: shards of tokens and features, of which single sequences are read.

A shard is one safetensors file: `tokens` int32 `[T]` and `features` float16 `[T, F]` of all its
sequences one after the other, `lengths` and `prompt_lengths` int32 `[B]`, `held_out` uint8 `[B]`;
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

from unispec.checkpoints.json_object import read_json_object
from unispec.errors import InputError

from .target import Answered

__all__ = [
    "Collection",
    "Example",
    "StoredSequence",
    "make_folder",
    "read_num_shards",
    "write_atomically",
]

_SETTINGS = "collection.json"


@dataclass(frozen=True)
class Example:
    """A prompt with its answer, and the target's features of it."""

    tokens: Tensor
    """int64 `[T]`."""
    features: Tensor
    """float32 `[T, F]`; the last row is zero and not read."""
    prompt_length: int
    """How many tokens are before the answer."""


@dataclass(frozen=True)
class StoredSequence:
    """Where a sequence is stored."""

    shard: Path
    """The file."""
    start: int
    """How many tokens are before it in the file."""
    length: int
    """How many tokens it has."""
    prompt_length: int
    """How many of them are before its answer."""


class Collection:
    """A folder of shards.

    Args:
        folder: created if it does not exist.
        settings: what the shards are made with.
        shards: how many to read; None reads all.

    Attributes:
        training: sequences to learn from.
        held_out: greedy answers to other prompts, to measure with.
        num_answer_tokens: how many tokens all answers have.
        num_shards: how many complete shards there are.

    Raises:
        InputError: the folder holds shards made with other settings, a damaged file, or fewer
            shards than asked for; or it cannot be made.
    """

    def __init__(
        self, folder: Path, settings: Mapping[str, Any], shards: int | None = None
    ) -> None:
        self.folder, self.settings = folder, dict(settings)
        make_folder(folder)
        path = folder / _SETTINGS
        if path.is_file():
            found = read_json_object(path, label=str(path), fix="give another folder")
            for name, value in settings.items():
                if found.get(name) != value:
                    raise InputError(
                        f"{folder} was collected with {name} {found.get(name)!r}, not"
                        f" {value!r}: give the same again, or another folder"
                    )
        else:
            write_atomically(path, lambda part: part.write_text(json.dumps(settings, indent=2)))
        self.training: list[StoredSequence] = []
        self.held_out: list[StoredSequence] = []
        self.num_answer_tokens = 0
        self.num_shards = 0
        self._index_shards(shards)
        if shards is not None and self.num_shards < shards:
            raise InputError(
                f"{folder} has {self.num_shards} of the {shards} shards that the fit began with:"
                " give that folder again, or another output"
            )

    def add(
        self, prompts: Sequence[str], answered: Sequence[Answered], held_out: Sequence[bool]
    ) -> None:
        """Writes the next shard.

        Args:
            prompts: the texts.
            answered: their sequences, in the same order.
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
        write_atomically(shard, lambda part: part.write_bytes(content))
        # Behind one that was damaged and deleted, others may lie.
        self._index_shards(None)

    def read(self, stored: StoredSequence) -> Example:
        """Reads one sequence of `training` or `held_out`."""
        end = stored.start + stored.length
        with safe_open(stored.shard, framework="pt") as tensors:
            return Example(
                tokens=tensors.get_slice("tokens")[stored.start : end].long(),
                features=tensors.get_slice("features")[stored.start : end].float(),
                prompt_length=stored.prompt_length,
            )

    def prompts(self) -> Iterator[str]:
        """Texts of the prompts of all sequences, shard by shard."""
        for number in range(self.num_shards):
            with safe_open(self._shard(number), framework="pt") as tensors:
                yield from _prompts(tensors)

    def count_tokens(self, vocab_size: int) -> Tensor:
        """How often each token stands in the answers to learn from, int64 `[V]`.

        Raises:
            InputError: a shard has a token that the target does not have.
        """
        counts = torch.zeros(vocab_size, dtype=torch.long)
        by_shard: dict[Path, list[StoredSequence]] = {}
        for stored in self.training:
            by_shard.setdefault(stored.shard, []).append(stored)
        for number in range(self.num_shards):
            shard = self._shard(number)
            with safe_open(shard, framework="pt") as tensors:
                tokens = tensors.get_tensor("tokens").long()
            for wrong in tokens[(tokens < 0) | (tokens >= vocab_size)][:1].tolist():
                raise _damaged(shard, f"token {wrong} is not one of the target's {vocab_size}")
            for stored in by_shard.get(shard, ()):
                begin, end = stored.start + stored.prompt_length, stored.start + stored.length
                counts += torch.bincount(tokens[begin:end], minlength=vocab_size)
        return counts

    def _shard(self, number: int) -> Path:
        return self.folder / f"shard-{number:05d}.safetensors"

    def _index_shards(self, limit: int | None) -> None:
        while limit is None or self.num_shards < limit:
            shard = self._shard(self.num_shards)
            if not shard.is_file():
                return
            self._index(shard)

    def _index(self, shard: Path) -> None:
        try:
            with safe_open(shard, framework="pt") as tensors:
                columns = _columns(tensors)
        except (OSError, SafetensorError, ValueError) as error:
            raise _damaged(shard, str(error)) from error
        start = 0
        for length, prompt_length, held_out in zip(*columns, strict=True):
            stored = StoredSequence(shard, start, length, prompt_length)
            (self.held_out if held_out else self.training).append(stored)
            self.num_answer_tokens += length - prompt_length
            start += length
        self.num_shards += 1


def _columns(tensors: Any) -> list[list[int]]:
    """Lengths, prompt lengths and whether it is held out, of each sequence of an open shard.

    Raises:
        ValueError: they do not fit each other, or the tokens.
    """
    names = ("lengths", "prompt_lengths", "held_out")
    columns: list[list[int]] = [tensors.get_tensor(name).tolist() for name in names]
    shapes = {name: tensors.get_slice(name).get_shape() for name in (*names, "tokens", "features")}
    lengths, prompt_lengths, held_out = columns
    is_consistent = (
        all(shapes[name] == [len(_prompts(tensors))] for name in names)
        and all(0 < prompt < length for prompt, length in zip(prompt_lengths, lengths, strict=True))
        and set(held_out) <= {0, 1}
        and shapes["tokens"] == [sum(lengths)]
        and [len(shapes["features"]), *shapes["features"][:1]] == [2, sum(lengths)]
    )
    if not is_consistent:
        raise ValueError(f"its tensors of shapes {list(shapes.values())} do not fit each other")
    return columns


def _prompts(tensors: Any) -> list[str]:
    """Texts of the prompts of an open shard.

    Raises:
        ValueError: it has none.
    """
    try:
        prompts = json.loads((tensors.metadata() or {}).get("prompts", ""))
    except RecursionError as error:
        raise ValueError("its prompts are nested") from error
    if not isinstance(prompts, list) or not all(isinstance(prompt, str) for prompt in prompts):
        raise ValueError("its prompts are no list of texts")
    return prompts


def _damaged(shard: Path, reason: str) -> InputError:
    return InputError(f"{shard} is damaged ({' '.join(reason.split())}): delete it and resume")


def make_folder(folder: Path) -> None:
    """Makes a folder and those that it lies in.

    Raises:
        InputError: it cannot be made.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{folder} cannot be made ({error.strerror}): give another") from error


def read_num_shards(path: Path) -> int:
    """Reads how many shards a fit began with.

    Raises:
        InputError: it is damaged.
    """
    fix = "delete it and resume"
    found = read_json_object(path, label=str(path), fix=fix).get("shards")
    if type(found) is not int or found < 1:
        raise InputError(f"{path} has {found!r} shards: {fix}")
    return found


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Writes a file that is either complete under its name or does not exist.

    Args:
        write: writes the content to the path that it is called with.

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
