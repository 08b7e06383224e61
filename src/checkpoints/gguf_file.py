"""A GGUF file's header and where its tensors lie, read within the bounds of the file.

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. Every count is held against
the bytes that are left, so that a damaged file is refused before it costs memory.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, NoReturn

import numpy as np
import numpy.typing as npt
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

from unispec.errors import InputError

__all__ = ["GGUFFile", "GGUFTensor", "is_gguf", "open_gguf"]

_MAGIC: Final = b"GGUF"
_VERSIONS: Final = (2, 3)
# Published headers have up to 20 MB, most of it the vocabulary and its merges.
_MAX_HEADER_BYTES: Final = 100_000_000
_MAX_DIMS: Final = 4
_DEFAULT_ALIGNMENT: Final = 32
_STRING: Final = 8
_ARRAY: Final = 9
_DTYPES: Final[Mapping[int, str]] = {
    0: "<u1",
    1: "<i1",
    2: "<u2",
    3: "<i2",
    4: "<u4",
    5: "<i4",
    6: "<f4",
    7: "|b1",
    10: "<u8",
    11: "<i8",
    12: "<f8",
}
# The least that one takes: a name without letters, a type and one byte; no dimensions.
_LEAST_PAIR_BYTES: Final = 8 + 4 + 1
_LEAST_TENSOR_BYTES: Final = 8 + 4 + 4 + 8


@dataclass(frozen=True)
class GGUFTensor:
    """One tensor as it lies in a file.

    Attributes:
        path: the file.
        name: llama.cpp's.
        kind: how its numbers are stored.
        shape: slowest dimension first, as numpy has it.
        data: uint8, `shape` with the last dimension in bytes; a view of the mapped file.
    """

    path: Path
    name: str
    kind: GGMLQuantizationType
    shape: tuple[int, ...]
    data: npt.NDArray[np.uint8]


@dataclass(frozen=True)
class GGUFFile:
    """The header of one file.

    Attributes:
        path: the file.
        values: of each metadata key an int, float, bool, the bytes of a string, an array of
            numbers or a list of the bytes of strings.
        tensors: in the order of the file.
    """

    path: Path
    values: Mapping[str, Any]
    tensors: tuple[GGUFTensor, ...]


def is_gguf(path: Path) -> bool:
    """Whether the file starts with GGUF's magic bytes.

    Raises:
        InputError: there is no such file, or it may not be read.
    """
    if not path.is_file():
        raise InputError(f"weight file {path} does not exist: correct the path")
    try:
        with path.open("rb") as file:
            return file.read(4) == _MAGIC
    except OSError as error:
        raise InputError(
            f"weight file {path} cannot be read ({error.strerror}): correct its permissions"
        ) from error


def open_gguf(path: Path) -> GGUFFile:
    """Maps a GGUF file read-only and parses its header; no tensor is read.

    Raises:
        InputError: the file is missing, truncated, damaged or no little-endian GGUF file.
    """
    if not is_gguf(path):
        raise InputError(f"{path} is not a GGUF file: give a file that llama.cpp can load")
    file = np.asarray(np.memmap(path, dtype=np.uint8, mode="r"))  # [bytes]
    header = _Header(path, file)
    version = header.integer("<I", "version")
    if version not in _VERSIONS:
        # A small number in the other byte order has nothing in its lower half.
        if version and not version & 0xFFFF:
            raise InputError(f"{path} has the other byte order: convert it for this machine")
        header.refuse(f"version {version}, known are {' and '.join(map(str, _VERSIONS))}")
    num_tensors = header.integer("<Q", "number of tensors")
    num_pairs = header.integer("<Q", "number of metadata keys")
    header.check_room(num_pairs, _LEAST_PAIR_BYTES, "metadata keys")
    header.check_room(num_tensors, _LEAST_TENSOR_BYTES, "tensors")
    values: dict[str, Any] = {}
    for _ in range(num_pairs):
        key = header.name("metadata key")
        if key in values:
            header.refuse(f"metadata key {key!r} is there twice")
        values[key] = header.value(header.integer("<I", f"type of {key!r}"), key)
    entries = _tensor_entries(header, num_tensors)
    alignment = values.get("general.alignment", _DEFAULT_ALIGNMENT)
    if type(alignment) is not int or alignment < 1 or alignment & (alignment - 1):
        header.refuse(f"general.alignment is {str(alignment)[:40]}, no power of two")
    start = -(-header.offset // alignment) * alignment
    return GGUFFile(path, values, tuple(_tensor(header, file[start:], *one) for one in entries))


def _tensor_entries(header: _Header, count: int) -> list[tuple[str, tuple[int, ...], int, int]]:
    """Name, shape, type and place of each tensor."""
    entries: dict[str, tuple[str, tuple[int, ...], int, int]] = {}
    for _ in range(count):
        name = header.name("tensor")
        if name in entries:
            header.refuse(f"tensor {name!r} is there twice")
        num_dims = header.integer("<I", f"dimensions of {name!r}")
        if num_dims > _MAX_DIMS:
            header.refuse(f"tensor {name!r} has {num_dims} dimensions, at most {_MAX_DIMS} are")
        dims = [header.integer("<Q", f"dimensions of {name!r}") for _ in range(num_dims)]
        kind = header.integer("<I", f"type of {name!r}")
        place = header.integer("<Q", f"place of {name!r}")
        entries[name] = (name, tuple(reversed(dims)), kind, place)
    return list(entries.values())


def _tensor(
    header: _Header,
    data: npt.NDArray[np.uint8],
    name: str,
    shape: tuple[int, ...],
    number: int,
    place: int,
) -> GGUFTensor:
    try:
        kind = GGMLQuantizationType(number)
    except ValueError:
        header.refuse(f"tensor {name!r} has the unknown type {number}")
    block, block_bytes = GGML_QUANT_SIZES[kind]
    last = shape[-1] if shape else 1
    if last % block:
        header.refuse(f"rows of {last} in tensor {name!r} are no whole blocks of {kind.name}")
    row_bytes = last // block * block_bytes
    size = math.prod(shape[:-1]) * row_bytes
    # No weight is without numbers, and what takes blocks apart stumbles over none.
    if size == 0 or place + size > data.size:
        header.refuse(
            f"tensor {name!r} of shape {list(shape)} has {size} bytes from byte {place} of the"
            f" data, the file holds {data.size}"
        )
    return GGUFTensor(
        header.path,
        name,
        kind,
        shape,
        data[place : place + size].reshape((*shape[:-1], row_bytes)),
    )


class _Header:
    """Reads a header from its beginning on, and never beyond the file."""

    def __init__(self, path: Path, file: npt.NDArray[np.uint8]) -> None:
        self.path = path
        self.offset = len(_MAGIC)
        self._bytes = file[:_MAX_HEADER_BYTES].data

    def refuse(self, reason: str) -> NoReturn:
        """Raises the error of a file that is not as the format says."""
        raise InputError(
            f"{self.path} is a truncated or damaged GGUF file ({reason}): download it again"
        )

    def check_room(self, count: int, least_bytes: int, what: str) -> None:
        """Refuses a count of which not even the shortest fit the file."""
        left = len(self._bytes) - self.offset
        if count * least_bytes > left:
            self.refuse(f"{count} {what} are stated and {left} bytes are left for them")

    def integer(self, form: str, what: str) -> int:
        """A number in the form of `struct`."""
        number: int = struct.unpack(form, self._take(struct.calcsize(form), what))[0]
        return number

    def name(self, what: str) -> str:
        """A key or a tensor's name, which must be UTF-8."""
        raw = self._string(f"name of a {what}")
        try:
            return raw.decode()
        except UnicodeDecodeError:
            self.refuse(f"the name {raw[:40]!r} of a {what} is no UTF-8")

    def value(self, kind: int, key: str) -> Any:
        """The value of a metadata key."""
        if kind == _STRING:
            return self._string(key)
        if kind == _ARRAY:
            return self._array(key)
        return self._numbers(kind, 1, key)[0].item()

    def _array(self, key: str) -> npt.NDArray[Any] | list[bytes]:
        kind = self.integer("<I", key)
        count = self.integer("<Q", key)
        if kind != _STRING:
            return self._numbers(kind, count, key)
        self.check_room(count, 8, f"strings of {key!r}")
        return [self._string(key) for _ in range(count)]

    def _numbers(self, kind: int, count: int, key: str) -> npt.NDArray[Any]:
        if kind not in _DTYPES:
            self.refuse(f"metadata key {key!r} has the unknown type {kind}")
        dtype = np.dtype(_DTYPES[kind])
        return np.frombuffer(self._take(count * dtype.itemsize, key), dtype)

    def _string(self, what: str) -> bytes:
        return bytes(self._take(self.integer("<Q", what), what))

    def _take(self, size: int, what: str) -> memoryview:
        end = self.offset + size
        if end > len(self._bytes):
            self.refuse(f"{what} ends at byte {end}, of {len(self._bytes)} bytes that it can be in")
        taken = self._bytes[self.offset : end]
        self.offset = end
        return taken
