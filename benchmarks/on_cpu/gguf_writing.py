"""GGUF files that are made once, in the cache."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from gguf import GGUFReader, GGUFValueType, GGUFWriter

from unispec.checkpoints.gguf_folder import cache_folder, make_once

__all__ = ["copy_metadata", "finish", "made_once", "weight_bytes"]

# The writer has its own of these.
_NOT_COPIED = ("GGUF.", "general.architecture", "general.file_type")


def made_once(name: str, write: Callable[[Path], None]) -> Path:
    """A file in the cache that is complete or not there.

    Args:
        name: without the ending.
        write: writes it to a path.
    """
    file = f"{name}.gguf"
    folder = make_once(
        cache_folder() / "benchmarks" / name, (file,), lambda unfinished: write(unfinished / file)
    )
    return folder / file


def copy_metadata(reader: GGUFReader, writer: GGUFWriter, prefix: str = "") -> None:
    """Copies what is said of the model, or only the keys that begin with `prefix`."""
    for name, field in reader.fields.items():
        if name.startswith(_NOT_COPIED) or not name.startswith(prefix):
            continue
        sub_type = field.types[-1] if field.types[0] is GGUFValueType.ARRAY else None
        writer.add_key_value(name, field.contents(), field.types[0], sub_type=sub_type)


def finish(writer: GGUFWriter) -> None:
    """Writes all that was added."""
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def weight_bytes(file: Path) -> int:
    """All tensors: what a step reads of a model whose embedding is its head as well."""
    return sum(int(tensor.n_bytes) for tensor in GGUFReader(file).tensors)
