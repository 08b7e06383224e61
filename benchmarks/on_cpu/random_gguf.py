"""Models of a known shape with random weights: as fast as the real ones, and of no other use."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
import numpy.typing as npt
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFWriter, TokenType

from .formats import Format
from .gguf_writing import finish, made_once

__all__ = ["SHAPES", "Shape", "random_gguf"]

_SPECIAL: Final = 256
"""Tokens of a Llama 3 that no text has, the last: the first begins a text, the next ends it."""
_STANDARD_DEVIATION: Final = 0.02
# Where a block has its float16 scales, in numbers of 2 bytes, and the standard deviation of its
# weights if the scale is 1 and all other bytes are random.
_SCALES: Final = {
    GGMLQuantizationType.Q8_0: ({0: 1.0}, 73.9),
    GGMLQuantizationType.Q4_0: ({0: 1.0}, 4.64),
    # Each of the 8 parts is scaled by 6 bits and lowered by 6 bits times the second scale.
    GGMLQuantizationType.Q4_K: ({0: 1.0, 1: 7.5}, 230.0),
    GGMLQuantizationType.Q6_K: ({104: 1.0}, 1366.0),
}


@dataclass(frozen=True, kw_only=True)
class Shape:
    """The sizes of a Llama whose embedding is its head, too."""

    name: str
    layers: int
    hidden: int
    heads: int
    key_heads: int
    head_dim: int
    intermediate: int
    vocabulary: int
    context: int
    rope_theta: float

    def matrices(self) -> Iterator[tuple[str, int, int]]:
        """Name, rows and columns of each matrix of the layers."""
        sizes = {
            "attn_q": (self.heads * self.head_dim, self.hidden),
            "attn_k": (self.key_heads * self.head_dim, self.hidden),
            "attn_v": (self.key_heads * self.head_dim, self.hidden),
            "attn_output": (self.hidden, self.heads * self.head_dim),
            "ffn_gate": (self.intermediate, self.hidden),
            "ffn_up": (self.intermediate, self.hidden),
            "ffn_down": (self.hidden, self.intermediate),
        }
        for layer in range(self.layers):
            for name, (rows, columns) in sizes.items():
                yield f"blk.{layer}.{name}.weight", rows, columns

    def norms(self) -> Iterator[str]:
        """Name of each norm."""
        yield "output_norm.weight"
        for layer in range(self.layers):
            yield f"blk.{layer}.attn_norm.weight"
            yield f"blk.{layer}.ffn_norm.weight"


SHAPES: Final = {
    shape.name: shape
    for shape in (
        Shape(
            name="llama-3.2-1b",
            layers=16,
            hidden=2048,
            heads=32,
            key_heads=8,
            head_dim=64,
            intermediate=8192,
            vocabulary=128256,
            context=8192,
            rope_theta=500000.0,
        ),
    )
}


def random_gguf(shape: Shape, form: Format) -> Path:
    """A file of that shape in this format; one file a format is made, for good."""

    def write(file: Path) -> None:
        random = np.random.default_rng(0)
        writer = GGUFWriter(file, "llama")
        _add_config(writer, shape, form)
        _add_tokenizer(writer, shape.vocabulary)
        kind = form.head(shape.hidden)
        embedding = _random_matrix(random, shape.vocabulary, shape.hidden, kind)
        writer.add_tensor("token_embd.weight", embedding, raw_dtype=kind)
        for name in shape.norms():
            writer.add_tensor(name, np.ones(shape.hidden, np.float32))
        for name, rows, columns in shape.matrices():
            values = _random_matrix(random, rows, columns, form.matrices)
            writer.add_tensor(name, values, raw_dtype=form.matrices)
        finish(writer)

    return made_once(f"random-{shape.name}-{form.label}", write)


def _add_config(writer: GGUFWriter, shape: Shape, form: Format) -> None:
    writer.add_name(f"random weights, {shape.name}")
    writer.add_block_count(shape.layers)
    writer.add_context_length(shape.context)
    writer.add_embedding_length(shape.hidden)
    writer.add_feed_forward_length(shape.intermediate)
    writer.add_head_count(shape.heads)
    writer.add_head_count_kv(shape.key_heads)
    writer.add_key_length(shape.head_dim)
    writer.add_value_length(shape.head_dim)
    writer.add_rope_dimension_count(shape.head_dim)
    writer.add_rope_freq_base(shape.rope_theta)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(shape.vocabulary)
    writer.add_file_type(form.file_type)


def _add_tokenizer(writer: GGUFWriter, vocabulary: int) -> None:
    """One that each program accepts: the 256 bytes, then made-up words."""
    printable = {*range(33, 127), *range(161, 173), *range(174, 256)}
    others = iter(range(256, 512))
    # GPT-2's character for each byte: itself if printable, else the next from U+0100.
    tokens = [chr(byte) if byte in printable else chr(next(others)) for byte in range(256)]
    tokens += [f"t{number}" for number in range(vocabulary - len(tokens))]
    kinds = [TokenType.NORMAL] * vocabulary
    bos = vocabulary - _SPECIAL
    eos = bos + 1
    kinds[bos] = kinds[eos] = TokenType.CONTROL
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("llama-bpe")
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    writer.add_token_merges(["t 0"])
    writer.add_bos_token_id(bos)
    writer.add_eos_token_id(eos)
    writer.add_add_bos_token(False)


def _random_matrix(
    random: np.random.Generator, rows: int, columns: int, kind: GGMLQuantizationType
) -> npt.NDArray[np.generic]:
    """Floats, or whole blocks as bytes `[rows, bytes]`."""
    if kind not in _SCALES:
        values = random.standard_normal((rows, columns), np.float32) * np.float32(
            _STANDARD_DEVIATION
        )
        if kind is GGMLQuantizationType.BF16:
            return (values.view(np.uint32) >> 16).astype(np.uint16).view(np.uint8)
        return values
    weights, size = GGML_QUANT_SIZES[kind]
    scales, deviation = _SCALES[kind]
    count = rows * columns // weights
    blocks = np.frombuffer(bytearray(random.bytes(count * size)), np.uint8).reshape(count, size)
    halves = blocks.view(np.float16)  # [count, size / 2]
    for place, factor in scales.items():
        halves[:, place] = factor * _STANDARD_DEVIATION / deviation
    return blocks.reshape(rows, -1)
