"""Weight files as numpy arrays under the names that the files give them."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final, Literal, NamedTuple, TypeAlias, overload

import numpy as np
import numpy.typing as npt
from gguf import GGMLQuantizationType

from unispec.checkpoints.gguf import can_stay, weight_of
from unispec.checkpoints.gguf_parts import gguf_among, open_gguf_parts
from unispec.checkpoints.halves import half_floats
from unispec.checkpoints.json_object import parse_json_object
from unispec.checkpoints.memory import check_memory
from unispec.checkpoints.packed_int4 import OTHER_PARTS, PACKED, WORD
from unispec.checkpoints.quantisation import unsupported
from unispec.checkpoints.stored import StoredMatrix
from unispec.errors import InputError

__all__ = ["NumberBytes", "Tensor", "Weight", "bytes_held", "check_weight_files", "read_tensors"]

Tensor: TypeAlias = npt.NDArray[Any]
"""A weight as a numpy array of any dtype and shape."""

Weight: TypeAlias = Tensor | StoredMatrix
"""A weight as an array, or as a matrix that stays as it is stored."""

NumberBytes: TypeAlias = Callable[[str, int], int]
"""Bytes of a number in a tensor of this name, with so many dimensions."""

_F16: Final = "F16"
_BF16: Final = "BF16"
_FLOAT8: Final = "F8_E4M3"
_INT32: Final = "I32"
_DTYPES: Final[Mapping[str, str]] = {
    "F64": "<f8",
    "F32": "<f4",
    _F16: "<f2",
    _BF16: "<u2",
    # As bytes: the values mean nothing without their scales, see `block_fp8`.
    _FLOAT8: "|u1",
    "I64": "<i8",
    _INT32: "<i4",
    "I16": "<i2",
    "I8": "|i1",
    "U64": "<u8",
    "U32": "<u4",
    "U16": "<u2",
    "U8": "|u1",
    "BOOL": "|b1",
}
_FLOATS: Final = ("F64", "F32", _F16, _BF16)
_HALVES: Final = (_F16, _BF16)
_WEIGHT: Final = ".weight"
_FLOAT32_BYTES: Final = 4
# What is narrower than a byte, or a byte of another kind than F8_E4M3.
_NARROW: Final = ("F8_", "F6_", "F4")
_LENGTH_BYTES: Final = 8
# The limit of the reference implementation; more is not a header but other data.
_MAX_HEADER_BYTES: Final = 100_000_000
# numpy's own limit.
_MAX_DIMS: Final = 64


@overload
def read_tensors(
    paths: Sequence[Path], *, float8_stays: bool = False, as_stored: Literal[False] = False
) -> dict[str, Tensor]: ...


@overload
def read_tensors(
    paths: Sequence[Path], *, float8_stays: bool = False, as_stored: bool
) -> dict[str, Weight]: ...


def read_tensors(
    paths: Sequence[Path], *, float8_stays: bool = False, as_stored: bool = False
) -> dict[str, Tensor] | dict[str, Weight]:
    """Reads one or more safetensors files, or one GGUF file.

    Safetensors tensors are read-only views of the mapped files: nothing is read before it
    is used. They keep their dtype, except those that numpy lacks: bfloat16 becomes float32,
    exactly, and float8 e4m3 is given as bytes. GGUF tensors are dequantised to float32
    and keep llama.cpp's names and row order (`read_gguf` gives the Hugging Face ones).

    Args:
        paths: the files; a sharded checkpoint is given as all of its shards, a split GGUF file
            as one or all of its parts.
        float8_stays: see `check_weight_files`.
        as_stored: whether matrices stay as they are stored: those named `*.weight` in float16 and
            bfloat16, and of a GGUF file those that `can_stay`.

    Returns:
        Each tensor of the files under its name, arrays C-contiguous and aligned.

    Raises:
        InputError: a file is missing, truncated, of another format, holds a
            dtype without a numpy equivalent, or repeats another file's tensor; or the tensors
            do not fit the memory.
    """
    check_weight_files(paths, float8_stays=float8_stays, as_stored=as_stored)
    gguf = gguf_among(paths)
    if gguf is not None:
        found = open_gguf_parts(gguf).tensors
        return {tensor.name: weight_of(tensor, as_stored=as_stored) for tensor in found}

    tensors: dict[str, Weight] = {}
    origin: dict[str, Path] = {}
    for path in paths:
        for name, tensor in _read_safetensors(path, as_stored).items():
            if name in origin:
                raise InputError(
                    f"tensor {name!r} is in both {origin[name]} and {path}: give the shards of one"
                    " checkpoint only"
                )
            origin[name] = path
            tensors[name] = tensor
    return tensors


def check_weight_files(
    paths: Sequence[Path], *, float8_stays: bool = False, as_stored: bool = False
) -> None:
    """Checks that files are whole and fit the memory, from their headers; no weight is read.

    Args:
        paths: what `read_tensors` takes.
        float8_stays: whether float8 takes as much memory as in the file; else it is dequantised
            after reading, to float32, as packed int4 always is.
        as_stored: whether matrices take as much memory as in the file, where `read_tensors` can
            keep them; else they become float32.

    Raises:
        InputError: as `read_tensors`, except for a tensor that is in two files.
    """
    if not paths:
        raise InputError("no weight file is given: name at least one safetensors or GGUF file")
    needed = bytes_held(paths, float8_stays=float8_stays, as_stored=as_stored)
    source = paths[0] if len(paths) == 1 else paths[0].parent
    if as_stored:
        form = "numbers as stored or as float32"
    elif float8_stays:
        form = "float8 as stored and other numbers as float32"
    else:
        form = "numbers as float32"
    check_memory(needed, source, form=form)


def bytes_held(
    paths: Sequence[Path],
    *,
    width: int | NumberBytes = _FLOAT32_BYTES,
    float8_stays: bool = False,
    as_stored: bool = False,
) -> int:
    """Bytes that the tensors of files take in memory, by their headers.

    Args:
        paths: what `read_tensors` takes.
        width: bytes of a number, or what gives them for a tensor; what is no number is as large as
            in the file.
        float8_stays: see `check_weight_files`.
        as_stored: see `check_weight_files`.

    Raises:
        InputError: a header is missing or damaged.
    """

    def each(name: str, dims: int) -> int:
        return width if isinstance(width, int) else width(name, dims)

    gguf = gguf_among(paths)
    if gguf is not None:
        return sum(
            t.data.nbytes
            if as_stored and can_stay(t)
            else each(t.name, len(t.shape)) * math.prod(t.shape)
            for t in open_gguf_parts(gguf).tensors
        )
    entries = [item for path in paths for item in _open_safetensors(path)[0].items()]

    def held(name: str, entry: _Entry) -> int:
        if as_stored and _stays(name, entry):
            return entry.end - entry.begin
        matrix = name.removesuffix(PACKED) + _WEIGHT if name.endswith(PACKED) else name
        return _held(name, entry, each(matrix, len(entry.shape)), float8_stays)

    # A packed matrix's other parts are dropped with the words.
    packed = {name.removesuffix(PACKED) for name, _ in entries if name.endswith(PACKED)}
    dropped = {name + part for name in packed for part in OTHER_PARTS}
    return sum(held(name, entry) for name, entry in entries if name not in dropped)


class _Entry(NamedTuple):
    """Where a tensor lies in the data of its file, in bytes."""

    dtype_name: str
    shape: tuple[int, ...]
    begin: int
    end: int


def _held(name: str, entry: _Entry, width: int, float8_stays: bool) -> int:
    """Bytes that a tensor takes in memory; what is no number takes those of the file."""
    as_numbers = width * math.prod(entry.shape)
    if name.endswith(PACKED) and entry.dtype_name == _INT32:
        return WORD * as_numbers
    widened = _FLOATS if float8_stays else (*_FLOATS, _FLOAT8)
    return as_numbers if entry.dtype_name in widened else entry.end - entry.begin


def _stays(name: str, entry: _Entry) -> bool:
    """Whether a tensor can stay as it is stored."""
    is_matrix = len(entry.shape) == 2 and name.endswith(_WEIGHT)
    return is_matrix and entry.dtype_name in _HALVES


def _read_safetensors(path: Path, as_stored: bool) -> dict[str, Weight]:
    entries, data = _open_safetensors(path)
    return {
        name: _matrix(entry, data) if as_stored and _stays(name, entry) else _tensor(entry, data)
        for name, entry in entries.items()
    }


def _open_safetensors(path: Path) -> tuple[dict[str, _Entry], npt.NDArray[np.uint8]]:
    """Maps one file: 8 bytes of header length (little-endian), JSON header, data.

    Format: https://huggingface.co/docs/safetensors/index#format.
    """
    size = path.stat().st_size
    if size < _LENGTH_BYTES:
        raise InputError(f"{path} has {size} bytes and is no safetensors file: {_DOWNLOAD_AGAIN}")
    file = np.asarray(np.memmap(path, dtype=np.uint8, mode="r"))  # [bytes]
    header_bytes = int.from_bytes(file[:_LENGTH_BYTES].tobytes(), "little")
    if header_bytes > _MAX_HEADER_BYTES:
        raise InputError(
            f"{path} is not a safetensors file: {_DOWNLOAD_AGAIN}, or convert it, for example with"
            " `model.save_pretrained(folder)` of transformers"
        )
    start = _LENGTH_BYTES + header_bytes
    if start > size:
        raise InputError(
            f"{path} is truncated: it has {size} bytes and its header alone needs {start};"
            f" {_DOWNLOAD_AGAIN}"
        )
    header = _parse_header(file[_LENGTH_BYTES:start].tobytes(), path)
    data = file[start:]
    return {name: _entry(name, raw, data.size, path) for name, raw in header.items()}, data


_DOWNLOAD_AGAIN: Final = "download or write it again"


def _parse_header(raw: bytes, path: Path) -> dict[str, Any]:
    header = parse_json_object(
        raw, label=f"{path} is not a safetensors file, its header", fix=_DOWNLOAD_AGAIN
    )
    header.pop("__metadata__", None)
    return header


def _entry(name: str, raw: Any, data_bytes: int, path: Path) -> _Entry:
    match raw:
        case {"dtype": str(dtype_name), "shape": list(shape), "data_offsets": [begin, end]} if all(
            type(number) is int and number >= 0 for number in (*shape, begin, end)
        ):
            pass
        case _:
            raise InputError(
                f"{path}: the header entry {str(raw)[:120]} of tensor {name!r} is malformed:"
                f" {_DOWNLOAD_AGAIN}"
            )
    if dtype_name not in _DTYPES and dtype_name.startswith(_NARROW):
        raise unsupported(f"tensor {name!r} of {path}", f"dtype {dtype_name}")
    if dtype_name not in _DTYPES:
        raise InputError(
            f"{path}: tensor {name!r} has the unsupported dtype {dtype_name!r}: use a checkpoint in"
            " F32, F16 or BF16"
        )
    if end > data_bytes:
        raise InputError(
            f"{path} is truncated: tensor {name!r} ends at byte {end} of the data, the file holds"
            f" {data_bytes}; {_DOWNLOAD_AGAIN}"
        )
    # A dimension beyond the data means nothing either, where another one is 0.
    if len(shape) > _MAX_DIMS or max(shape, default=0) > data_bytes:
        raise InputError(
            f"{path}: tensor {name!r} has the shape {str(shape)[:80]}, which no {data_bytes} bytes"
            f" of data hold: {_DOWNLOAD_AGAIN}"
        )
    needed = math.prod(shape) * np.dtype(_DTYPES[dtype_name]).itemsize
    if end - begin != needed:
        raise InputError(
            f"{path}: tensor {name!r} of shape {shape} and dtype {dtype_name} needs {needed}"
            f" bytes, its header entry has [{begin}, {end}): {_DOWNLOAD_AGAIN}"
        )
    return _Entry(dtype_name, tuple(shape), begin, end)


def _matrix(entry: _Entry, data: npt.NDArray[np.uint8]) -> StoredMatrix:
    """A matrix of numbers of 2 bytes."""
    rows, columns = entry.shape
    stored = data[entry.begin : entry.end]
    aligned = stored if stored.view("<u2").flags.aligned else stored.copy()
    kind = GGMLQuantizationType[entry.dtype_name]
    return StoredMatrix(kind, (rows, columns), aligned.reshape(rows, 2 * columns))


def _tensor(entry: _Entry, data: npt.NDArray[np.uint8]) -> Tensor:
    stored = data[entry.begin : entry.end]
    if entry.dtype_name == _BF16:
        return half_floats(stored, GGMLQuantizationType.BF16).reshape(entry.shape)
    tensor = stored.view(_DTYPES[entry.dtype_name]).reshape(entry.shape)
    return tensor if tensor.flags.aligned else tensor.copy()
