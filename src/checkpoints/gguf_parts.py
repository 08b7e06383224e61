"""A model that is split over several GGUF files, by llama.cpp's rules.

Part i of N has the name `...-0000i-of-0000N.gguf`, counted from 1, and says so in `split.no`,
counted from 0, and `split.count`. The first part has the metadata of the model.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from unispec.checkpoints.gguf_file import GGUFFile, GGUFTensor, is_gguf, open_gguf
from unispec.checkpoints.gguf_metadata import Metadata
from unispec.errors import InputError

__all__ = ["gguf_among", "open_gguf_parts", "part_paths"]

_NAME: Final = re.compile(r"(.+)-(\d{5})-of-(\d{5})\.gguf")
_COUNT: Final = "split.count"
_NUMBER: Final = "split.no"
_NUM_TENSORS: Final = "split.tensors.count"


def part_paths(path: Path) -> list[Path]:
    """Where the parts of a model lie, by the name of one; the path alone if it names no part."""
    match = _NAME.fullmatch(path.name)
    if match is None or not 1 <= int(match[2]) <= int(match[3]):
        return [path]
    count = int(match[3])
    return [path.with_name(f"{match[1]}-{n:05d}-of-{match[3]}.gguf") for n in range(1, count + 1)]


def gguf_among(paths: Sequence[Path]) -> Path | None:
    """The one GGUF file, or the first of its parts; None if no file is GGUF.

    Raises:
        InputError: a file is missing, or there are other weight files beside it.
    """
    if not any([is_gguf(path) for path in paths]):
        return None
    parts = part_paths(paths[0])
    if len(paths) > 1 and (len(set(paths)) < len(paths) or not set(paths) <= set(parts)):
        raise InputError(
            f"{len(paths)} weight files are given and one of them is GGUF: give the one GGUF file"
            " alone, or all parts of one"
        )
    return paths[0] if len(paths) == 1 else parts[0]


def open_gguf_parts(path: Path) -> GGUFFile:
    """Maps all parts of a model and parses their headers.

    Args:
        path: the file, or any part of a split one; the others lie beside it.

    Returns:
        The metadata of the first part and the tensors of all.

    Raises:
        InputError: a part is missing, damaged, or one of another model.
    """
    given = open_gguf(path)
    count = Metadata(path, given.values).integer(_COUNT, default=1)
    if count < 2:
        return given
    paths = part_paths(path)
    if len(paths) != count:
        raise InputError(
            f"{path} is one of {count} parts by its {_COUNT}, and its name does not end in"
            f" -00001-of-{count:05d}.gguf or the like: give the parts their own names"
        )
    files = [_open_part(part, number, count) for number, part in enumerate(paths)]
    tensors: dict[str, GGUFTensor] = {}
    for tensor in (tensor for file in files for tensor in file.tensors):
        if tensor.name in tensors:
            raise InputError(
                f"tensor {tensor.name!r} is in both {tensors[tensor.name].path} and {tensor.path}:"
                " give the parts of one model only"
            )
        tensors[tensor.name] = tensor
    first = files[0]
    stated = Metadata(first.path, first.values).integer(_NUM_TENSORS, default=len(tensors))
    if stated != len(tensors):
        raise InputError(
            f"{first.path} states {stated} tensors in {_NUM_TENSORS}, its {count} parts have"
            f" {len(tensors)}: download all parts again"
        )
    return GGUFFile(first.path, first.values, tuple(tensors.values()))


def _open_part(path: Path, number: int, count: int) -> GGUFFile:
    if not path.is_file():
        raise InputError(
            f"{path} is not there, part {number + 1} of {count}: download all parts into one folder"
        )
    file = open_gguf(path)
    metadata = Metadata(path, file.values)
    found = metadata.integer(_NUMBER, default=0), metadata.integer(_COUNT, default=1)
    if found != (number, count):
        raise InputError(
            f"{path} has {_NUMBER} {found[0]} and {_COUNT} {found[1]}, its name says {number} and"
            f" {count}: give the parts their own names"
        )
    return file
