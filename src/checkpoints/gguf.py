"""A GGUF file of a Llama as a Hugging Face checkpoint: configuration and weights.

Names of keys and tensors: the GGUF specification,
https://github.com/ggml-org/ggml/blob/master/docs/gguf.md.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, TypeAlias

import gguf
import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer

from unispec.checkpoints.gguf_config import llama_config
from unispec.checkpoints.gguf_file import GGUFTensor
from unispec.checkpoints.gguf_metadata import Metadata
from unispec.checkpoints.gguf_parts import open_gguf_parts
from unispec.checkpoints.gguf_tokenizer import build_tokenizer
from unispec.checkpoints.stored import KEPT, StoredMatrix
from unispec.errors import InputError

__all__ = ["GGUFCheckpoint", "can_stay", "read_gguf", "weight_of"]

_ARCHITECTURE: Final = "llama"
_ROPE_DIVISORS: Final = "rope_freqs.weight"
_GLOBAL_NAMES: Final[Mapping[str, str]] = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
}
_LAYER_NAMES: Final[Mapping[str, str]] = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_LAYER_TENSOR: Final = re.compile(r"blk\.(\d+)\.(\w+)\.(weight|bias)")

FloatTensor: TypeAlias = npt.NDArray[np.float32]


@dataclass(frozen=True)
class GGUFCheckpoint:
    """One GGUF file in the terms of Hugging Face.

    Attributes:
        path: the file; of a split one the first part.
        config: what `config.json` of the same model holds (`LlamaConfig`).
        metadata: key-value pairs of the file.
        tensors: weights under Hugging Face's names, made when they are asked for: float32, or as
            they are stored; rows of q_proj and k_proj are in half-split rope order.
    """

    path: Path
    config: dict[str, Any]
    tensors: Mapping[str, FloatTensor | StoredMatrix]
    metadata: Metadata

    @property
    def chat_template(self) -> str | None:
        """The Jinja chat template, where the file has one."""
        return self.metadata.optional_text("tokenizer.chat_template")

    def tokenizer(self) -> Tokenizer:
        """Builds the tokenizer that the metadata describe.

        Raises:
            InputError: the tokenizer model or its pre-tokenizer is not supported.
        """
        return build_tokenizer(self.metadata)


def _dequantise(tensor: GGUFTensor) -> FloatTensor:
    """One tensor of a GGUF file in float32."""
    try:
        flat = gguf.dequantize(tensor.data, tensor.kind)
    except NotImplementedError as error:  # The gguf package's, for a type it cannot unpack.
        raise InputError(
            f"{tensor.path}: tensor {tensor.name!r} has the unsupported type {tensor.kind.name}:"
            " use a file in F32, F16, BF16, Q8_0, a K-quant or a Q4/Q5 type"
        ) from error
    return np.require(flat.reshape(tensor.shape), np.float32, ["C", "A"])


def can_stay(tensor: GGUFTensor) -> bool:
    """Whether a tensor can stay as it is stored: a matrix in one of `KEPT`."""
    return tensor.kind in KEPT and len(tensor.shape) == 2


def weight_of(tensor: GGUFTensor, *, as_stored: bool) -> FloatTensor | StoredMatrix:
    """One tensor of a GGUF file, as it lies there if that is asked for and it `can_stay`.

    Raises:
        InputError: the tensor's quantisation is not supported.
    """
    return _stored(tensor) if as_stored and can_stay(tensor) else _dequantise(tensor)


def read_gguf(path: Path, as_stored: bool = False) -> GGUFCheckpoint:
    """Reads the metadata and maps the tensors of a Llama GGUF file.

    Args:
        path: the file, or a part of a split one, whose other parts lie beside it.
        as_stored: whether matrices stay as the file stores them, where they `can_stay`; all other
            tensors become float32.

    Raises:
        InputError: the file is missing, damaged, of another architecture, or uses
            a feature that a Hugging Face Llama does not have.
    """
    file = open_gguf_parts(path)
    path = file.path
    metadata = Metadata(path, file.values)
    architecture = metadata.text("general.architecture")
    if architecture != _ARCHITECTURE:
        raise InputError(
            f"{path} holds the architecture {architecture!r}: use a GGUF file of architecture"
            f" {_ARCHITECTURE!r}"
        )
    entries = {tensor.name: tensor for tensor in file.tensors}
    divisors = entries.pop(_ROPE_DIVISORS, None)
    config = llama_config(
        metadata,
        {name: tensor.shape for name, tensor in entries.items()},
        rope_divisors=None if divisors is None else _dequantise(divisors),
    )
    return GGUFCheckpoint(
        path=path,
        config=config,
        tensors=_Tensors(
            path,
            {_hf_name(name, path): tensor for name, tensor in entries.items()},
            query_heads=config["num_attention_heads"],
            key_heads=config["num_key_value_heads"],
            as_stored=as_stored,
        ),
        metadata=metadata,
    )


class _Tensors(Mapping[str, FloatTensor | StoredMatrix]):
    """Makes a tensor each time that it is asked for, and keeps none."""

    def __init__(
        self,
        path: Path,
        entries: Mapping[str, GGUFTensor],
        *,
        query_heads: int,
        key_heads: int,
        as_stored: bool,
    ) -> None:
        self._path = path
        self._entries = entries
        self._heads = {"q_proj": query_heads, "k_proj": key_heads}
        self._as_stored = as_stored

    def __getitem__(self, name: str) -> FloatTensor | StoredMatrix:
        entry = self._entries[name]
        tensor = weight_of(entry, as_stored=self._as_stored)
        heads = self._heads.get(name.split(".")[-2])
        if heads is None:
            return tensor
        if tensor.shape[0] % (2 * heads):
            raise InputError(
                f"{self._path}: tensor {name!r} has {tensor.shape[0]} rows, expected {heads} heads"
                " of an even number each: download the file again"
            )
        order = _half_split_order(tensor.shape[0], heads)
        if isinstance(tensor, StoredMatrix):
            return tensor.reordered(order, f"rows of {heads} heads half-split")
        return tensor[order]

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)


def _stored(tensor: GGUFTensor) -> StoredMatrix:
    """A matrix of the file as it lies there."""
    rows, columns = tensor.shape
    path = tensor.path.resolve()
    stat = path.stat()
    origin = repr((str(path), stat.st_size, stat.st_mtime_ns, tensor.name))
    return StoredMatrix(tensor.kind, (rows, columns), tensor.data, origin)


def _half_split_order(rows: int, heads: int) -> npt.NDArray[np.int64]:
    """What undoes the row order that llama.cpp gives q_proj and k_proj, int64 `[rows]`.

    llama.cpp rotates the rows 2j and 2j + 1 of a head as a pair, Hugging Face the
    rows j and j + head_dim / 2.
    """
    interleaved = np.arange(rows, dtype=np.int64).reshape(heads, -1, 2)  # [heads, D/2, 2]
    return interleaved.swapaxes(1, 2).reshape(rows)


def _hf_name(name: str, path: Path) -> str:
    if match := _LAYER_TENSOR.fullmatch(name):
        layer, module, kind = match.groups()
        if module in _LAYER_NAMES:
            return f"model.layers.{layer}.{_LAYER_NAMES[module]}.{kind}"
    else:
        module, _, kind = name.rpartition(".")
        if module in _GLOBAL_NAMES and kind == "weight":
            return f"{_GLOBAL_NAMES[module]}.{kind}"
    raise InputError(
        f"{path}: tensor {name!r} has no place in a Llama: use a GGUF file of a dense Llama"
    )
