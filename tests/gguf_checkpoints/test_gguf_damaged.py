"""GGUF files that cannot be used are refused in one line."""

from __future__ import annotations

import math
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf import GGMLQuantizationType
from gguf_files import refused, tiny_llama, write_gguf

from unispec.checkpoints import check_weight_files, memory, read_gguf


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        ({"architecture": "qwen2"}, ["'qwen2'", "'llama'"]),
        ({"metadata": {"llama.embedding_length": None}}, ["llama.embedding_length"]),
        ({"metadata": {"llama.block_count": "two"}}, ["block_count", "'two'", "an integer"]),
        ({"metadata": {"llama.attention.head_count_kv": [2, 2]}}, ["head_count_kv", "[2, 2]"]),
        ({"metadata": {"llama.attention.head_count": 0}}, ["0 query heads"]),
        ({"metadata": {"llama.attention.head_count_kv": 3}}, ["4 query heads", "3 key heads"]),
        ({"metadata": {"llama.rope.dimension_count": 16}}, ["dimension_count is 16", "32"]),
        ({"metadata": {"llama.expert_count": 8}}, ["expert_count is 8"]),
        ({"metadata": {"llama.rope.scaling.type": "yarn"}}, ["'yarn'", "linear"]),
        ({"metadata": {"llama.rope.scaling.type": "linear"}}, ["scaling.factor"]),
        ({"tensors": {"blk.0.attn_q_norm.weight": np.ones(32, np.float32)}}, ["attn_q_norm"]),
        ({"tensors": {"mystery": np.ones(32, np.float32)}}, ["'mystery'"]),
    ],
)
def test_bad_model(tmp_path: Path, arguments: dict[str, Any], parts: list[str]) -> None:
    path = write_gguf(tmp_path / "a.gguf", **arguments)
    with refused("a.gguf", *parts):
        read_gguf(path)


def test_query_rows_that_do_not_fit_the_heads(tmp_path: Path) -> None:
    metadata = {"llama.attention.head_count": 5, "llama.attention.head_count_kv": 5}
    checkpoint = read_gguf(write_gguf(tmp_path / "a.gguf", metadata=metadata))
    with refused("model.layers.0.self_attn.q_proj.weight", "128 rows", "5 heads"):
        checkpoint.tensors["model.layers.0.self_attn.q_proj.weight"]


def test_integer_tensor(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "a.gguf", tensors={"blk.0.attn_q.bias": np.ones(128, np.int32)})
    with refused("blk.0.attn_q.bias", "I32"):
        read_gguf(path).tensors["model.layers.0.self_attn.q_proj.bias"]


@pytest.mark.parametrize("kept", [4, 20, 200, 4000, -1])
def test_truncated_file(tmp_path: Path, kept: int) -> None:
    path = write_gguf(tmp_path / "a.gguf")
    path.write_bytes(path.read_bytes()[:kept])
    with refused("a.gguf", "truncated"):
        read_gguf(path)


def raw_gguf(*parts: bytes | int, tensors: int = 0, pairs: int = 0) -> bytes:
    """A file of version 3; a number stands for 8 bytes."""
    numbers = (part if isinstance(part, bytes) else struct.pack("<Q", part) for part in parts)
    return b"GGUF" + struct.pack("<IQQ", 3, tensors, pairs) + b"".join(numbers)


def u32(number: int) -> bytes:
    return struct.pack("<I", number)


STRING, ARRAY = u32(8), u32(9)


@pytest.mark.parametrize(
    ("content", "parts"),
    [
        (raw_gguf(b"\0" * 1000, pairs=2**60), [str(2**60), "metadata keys", "1000 bytes"]),
        (raw_gguf(b"\0" * 1000, tensors=2**60), [str(2**60), "tensors", "1000 bytes"]),
        (raw_gguf(b"\0" * 1000, pairs=2), ["metadata key ''", "twice"]),
        (raw_gguf(b"\0" * 1000, tensors=2), ["tensor ''", "twice"]),
        (raw_gguf(1, b"k", ARRAY, STRING, 2**60, pairs=1), [str(2**60), "strings of 'k'"]),
        (raw_gguf(1, b"k", ARRAY, u32(6), 2**60, pairs=1), ["k ends at byte"]),
        (raw_gguf(1, b"k", ARRAY, ARRAY, 1, pairs=1), ["'k'", "type 9"]),
        (raw_gguf(1, b"k", STRING, 2**63, pairs=1), ["k ends at byte"]),
        (raw_gguf(2**63, b"k" * 20, pairs=1), ["name of a metadata key"]),
        (raw_gguf(2, b"\xff\xfe", u32(0), b"\0", pairs=1), [r"b'\xff\xfe'", "UTF-8"]),
        (raw_gguf(1, b"\xff", b"\0" * 30, tensors=1), [r"b'\xff'", "UTF-8"]),
        (raw_gguf(1, b"k", u32(77), b"\0" * 9, pairs=1), ["'k'", "type 77"]),
        (raw_gguf(1, b"t", u32(2**31), b"\0" * 20, tensors=1), [str(2**31), "dimensions"]),
        (raw_gguf(1, b"t", u32(2), 2**63, 2**63, u32(0), 0, tensors=1), [str(2**63), "bytes"]),
        (raw_gguf(1, b"t", u32(2), 0, 2**63, u32(0), 0, tensors=1), [str(2**63), "bytes"]),
        (raw_gguf(1, b"t", u32(2), 0, 5, u32(8), 0, tensors=1), ["[5, 0]", "0 bytes"]),
        (raw_gguf(1, b"t", u32(1), 1, u32(0), 2**63, tensors=1), ["4 bytes from byte"]),
        (raw_gguf(1, b"t", u32(1), 33, u32(8), 0, tensors=1), ["rows of 33", "Q8_0"]),
        (raw_gguf(1, b"t", u32(1), 1, u32(99), 0, tensors=1), ["'t'", "type 99"]),
        (raw_gguf(17, b"general.alignment", u32(4), u32(0), pairs=1), ["alignment is 0"]),
        (raw_gguf(17, b"general.alignment", u32(4), u32(24), pairs=1), ["alignment is 24"]),
        (b"GGUF" + u32(4) + b"\0" * 16, ["version 4"]),
        (b"GGUF" + b"\0" * 20, ["version 0"]),
    ],
)
def test_counts_and_names_that_the_file_does_not_hold(
    tmp_path: Path, content: bytes, parts: list[str]
) -> None:
    path = tmp_path / "a.gguf"
    path.write_bytes(content)
    with refused("a.gguf", "damaged", "again", *parts):
        check_weight_files([path])


def test_file_of_the_other_byte_order(tmp_path: Path) -> None:
    (tmp_path / "a.gguf").write_bytes(b"GGUF" + struct.pack(">IQQ", 3, 0, 0))
    with refused("a.gguf", "other byte order"):
        check_weight_files([tmp_path / "a.gguf"])


def test_text_that_is_no_utf8_is_refused_where_it_is_needed(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "a.gguf", metadata={"tokenizer.chat_template": "abc"})
    path.write_bytes(path.read_bytes().replace(b"abc", b"a\xffc").replace(b"<tool>", b"<to\xffl>"))
    checkpoint = read_gguf(path)
    with refused("a.gguf", "tokenizer.chat_template", "UTF-8"):
        _ = checkpoint.chat_template
    with refused("a.gguf", "tokenizer.ggml.tokens", "UTF-8"):
        checkpoint.tokenizer()


def test_numbers_that_are_not_finite(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "a.gguf", metadata={"llama.rope.freq_base": math.inf})
    with refused("llama.rope.freq_base", "inf", "finite"):
        read_gguf(path)


def test_more_layers_than_the_file_has_tensors(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "a.gguf", metadata={"llama.block_count": 10**9})
    with refused("llama.block_count", str(10**9), "21 tensors"):
        read_gguf(path)


def test_a_gguf_file_needs_four_bytes_for_each_weight(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_llama()
    path = write_gguf(tmp_path / "a.gguf", model, kind=GGMLQuantizationType.Q8_0)
    needed = 4 * sum(parameter.numel() for parameter in model.parameters())
    monkeypatch.setattr(memory, "available_memory", lambda: needed)
    check_weight_files([path])
    monkeypatch.setattr(memory, "available_memory", lambda: needed - 1)
    with refused("a.gguf", "memory"):
        check_weight_files([path])


def test_no_gguf_file(tmp_path: Path) -> None:
    with refused("absent.gguf", "does not exist"):
        read_gguf(tmp_path / "absent.gguf")
    (tmp_path / "b.gguf").write_bytes(b"{}")
    with refused("b.gguf", "not a GGUF file"):
        read_gguf(tmp_path / "b.gguf")
