"""Safetensors files: read as they lie, counted before they are read, refused when damaged."""

from __future__ import annotations

import json
import os
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file
from safetensors.torch import save_file as save_torch_file
from states import refused

from unispec.checkpoints import check_weight_files, memory, read_tensors


def write_raw(path: Path, header: object, data: bytes) -> Path:
    raw = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(raw)) + raw + data)
    return path


@pytest.mark.parametrize("dtype", ["float64", "float32", "float16", "int64", "int32", "uint8"])
def test_safetensors_keep_values_and_dtypes(tmp_path: Path, dtype: str) -> None:
    written = {
        "matrix": np.arange(15).reshape(3, 5).astype(dtype),
        "scalar": np.array(7, dtype),
        "empty": np.zeros((0, 4), dtype),
    }
    save_file(written, tmp_path / "a.safetensors")
    read = read_tensors([tmp_path / "a.safetensors"])
    assert read.keys() == written.keys()
    for name, tensor in written.items():
        assert read[name].dtype == tensor.dtype
        np.testing.assert_array_equal(read[name], tensor)


def test_bool_tensors(tmp_path: Path) -> None:
    mask = torch.tensor([True, False, True])
    save_torch_file({"t2d": mask}, tmp_path / "a.safetensors")
    np.testing.assert_array_equal(read_tensors([tmp_path / "a.safetensors"])["t2d"], mask.numpy())


def test_bfloat16_becomes_exactly_the_same_float32(tmp_path: Path) -> None:
    every_bit_pattern = torch.arange(2**16, dtype=torch.int32).to(torch.int16)
    tensor = every_bit_pattern.view(torch.bfloat16).reshape(256, 256)
    save_torch_file({"w": tensor}, tmp_path / "a.safetensors")
    read = read_tensors([tmp_path / "a.safetensors"])["w"]
    assert read.dtype == np.float32
    np.testing.assert_array_equal(read, tensor.float().numpy())


def test_shards_are_joined(tmp_path: Path) -> None:
    a, b = np.array([1, 2], np.float32), np.array([[3]], np.float32)
    save_file({"a": a}, tmp_path / "1.safetensors")
    save_file({"b": b}, tmp_path / "2.safetensors")
    read = read_tensors([tmp_path / "1.safetensors", tmp_path / "2.safetensors"])
    assert read.keys() == {"a", "b"}
    np.testing.assert_array_equal(read["b"], b)


def test_views_are_lazy_and_read_only(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    save_file({"w": np.zeros(1024, np.float32)}, path)
    tensor = read_tensors([path])["w"]
    assert not tensor.flags.owndata
    with pytest.raises(ValueError, match="read-only"):
        tensor[:] = 1
    # A private mapping that could be written would count as memory that this process asks for.
    with path.open("r+b") as file:
        file.seek(-4, os.SEEK_END)
        file.write(np.float32(7).tobytes())
    assert tensor[-1] == 7


ITEM_BYTES = {"BF16": 2, "F16": 2, "F8_E4M3": 1, "I32": 4, "I8": 1}


def sparse(path: Path, name: str, dtype: str, num_bytes: int) -> Path:
    """A safetensors file with one tensor of zeros that takes no room on the disk."""
    shape = [num_bytes // (2 * ITEM_BYTES[dtype]), 2]
    write_raw(path, {name: {"dtype": dtype, "shape": shape, "data_offsets": [0, num_bytes]}}, b"")
    os.truncate(path, path.stat().st_size + num_bytes)
    return path


@pytest.mark.parametrize(
    ("name", "dtype", "factor"),
    [
        ("w.weight", "BF16", 2),
        ("w.weight", "F16", 2),
        # Multiplied by their scales, in one matrix of float32.
        ("w.weight", "F8_E4M3", 4),
        ("w.weight_packed", "I32", 8),
        ("w.ids", "I32", 1),
        ("w.codes", "I8", 1),
    ],
)
def test_what_the_memory_must_hold_is_said_before_anything_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, dtype: str, factor: int
) -> None:
    path = sparse(tmp_path / "a.safetensors", name, dtype, 141 * 10**9)
    needed = 141 * factor
    monkeypatch.setattr(memory, "available_memory", lambda: needed * 10**9)
    check_weight_files([path])
    monkeypatch.setattr(memory, "available_memory", lambda: (needed - 1) * 10**9)
    for look in (check_weight_files, read_tensors):
        with refused(str(path), f"need {needed}.0 GB", f"{needed - 1}.0 GB", "smaller model"):
            look([path])


def test_float8_that_is_computed_with_takes_what_the_file_takes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = sparse(tmp_path / "a.safetensors", "w.weight", "F8_E4M3", 141 * 10**9)
    monkeypatch.setattr(memory, "available_memory", lambda: 142 * 10**9)
    assert read_tensors([path], float8_stays=True)["w.weight"].nbytes == 141 * 10**9
    monkeypatch.setattr(memory, "available_memory", lambda: 140 * 10**9)
    for look in (check_weight_files, read_tensors):
        with refused("need 141.0 GB", "float8 as stored and other numbers as float32", "140.0 GB"):
            look([path], float8_stays=True)


def test_codes_and_float32_count_as_they_lie(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    codes, scales = np.zeros((256, 512), np.int8), np.zeros(64, np.float32)
    save_file({"codes": codes, "scales": scales}, tmp_path / "a.safetensors")
    found: list[int] = []
    monkeypatch.setattr(
        "unispec.checkpoints.tensors.check_memory",
        lambda needed, source, *, form: found.append(needed),
    )
    check_weight_files([tmp_path / "a.safetensors"])
    assert found == [256 * 512 + 4 * 64]


def test_the_memory_of_this_machine_is_known() -> None:
    pages = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    assert pages / 100 < memory.available_memory() <= pages


def test_unaligned_data_are_copied_to_an_aligned_array(tmp_path: Path) -> None:
    values = np.array([1.5, -2.5], np.float32)
    header = {
        "byte": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]},
        "w": {"dtype": "F32", "shape": [2], "data_offsets": [1, 9]},
    }
    tensor = read_tensors([write_raw(tmp_path / "a", header, b"\x07" + values.tobytes())])["w"]
    assert tensor.flags.aligned
    np.testing.assert_array_equal(tensor, values)


def test_no_file() -> None:
    with refused("no weight file", "name at least one"):
        read_tensors([])


def test_missing_file(tmp_path: Path) -> None:
    with refused("absent.safetensors", "does not exist"):
        read_tensors([tmp_path / "absent.safetensors"])


@pytest.mark.parametrize("kept", [0, 5, 20, -1])
def test_truncated_file(tmp_path: Path, kept: int) -> None:
    path = tmp_path / "a.safetensors"
    save_file({"w": np.ones(8, np.float32)}, path)
    path.write_bytes(path.read_bytes()[:kept])
    with refused("a.safetensors", "again"):
        read_tensors([path])


@pytest.mark.parametrize(
    "content",
    [
        b"PK\x03\x04 a zip archive of torch",
        struct.pack("<Q", 4) + b"abcd",
        struct.pack("<Q", 2) + b"[]",
        struct.pack("<Q", 100_000) + b"[" * 100_000,
        struct.pack("<Q", 800) + b'{"a":' * 130 + b"{}" + b"}" * 130 + b" " * 18,
        struct.pack("<Q", 10) + b'{"w": 1e9}'.replace(b"1e9", b"NaN"),
        struct.pack("<Q", 12) + b'{"w": 1e999}',
        struct.pack("<Q", 7) + b'{"\xff":1}',
    ],
)
def test_file_of_another_format(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "pytorch_model.bin").write_bytes(content)
    with refused("pytorch_model.bin", "not a safetensors file"):
        read_tensors([tmp_path / "pytorch_model.bin"])


@pytest.mark.parametrize(
    ("entry", "parts"),
    [
        ({"dtype": "F8_E5M2", "shape": [4], "data_offsets": [0, 4]}, ["F8_E5M2", "not quantised"]),
        ({"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}, ["[2]", "8 bytes", "[0, 4)"]),
        ({"dtype": "F32", "shape": [1], "data_offsets": [-4, 0]}, ["[-4, 0]"]),
        ({"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}, ["truncated", "8", "4"]),
        ({"dtype": "F32", "shape": [-1, -1], "data_offsets": [0, 4]}, ["[-1, -1]"]),
        ({"dtype": "F32", "shape": [1]}, ["malformed"]),
        ({"dtype": "F32", "shape": 1, "data_offsets": [0, 4]}, ["malformed"]),
        ({"dtype": ["F32"], "shape": [1], "data_offsets": [0, 4]}, ["F32"]),
        ({"dtype": "F32", "shape": [1.0], "data_offsets": [0, 4]}, ["[1.0]", "malformed"]),
        ({"dtype": "F32", "shape": [True], "data_offsets": [0, 4]}, ["[True]", "malformed"]),
        ({"dtype": "F32", "shape": [0, 10**30], "data_offsets": [0, 0]}, [str(10**30)]),
        ({"dtype": "F32", "shape": [1] * 65, "data_offsets": [0, 4]}, ["[1, 1"]),
        ({"dtype": "F32", "shape": [10**4000] * 60, "data_offsets": [0, 4]}, ["[1000"]),
        ("F32", ["malformed"]),
    ],
)
def test_bad_header_entry(tmp_path: Path, entry: object, parts: list[str]) -> None:
    path = write_raw(tmp_path / "a.safetensors", {"w": entry}, b"\0" * 4)
    with refused("a.safetensors", "'w'", *parts):
        read_tensors([path])


def test_tensor_in_two_files(tmp_path: Path) -> None:
    paths = [tmp_path / "1.safetensors", tmp_path / "2.safetensors"]
    for path in paths:
        save_file({"w": np.zeros(1, np.float32)}, path)
    with refused("'w'", "1.safetensors", "2.safetensors"):
        read_tensors(paths)


def test_torch_is_not_imported() -> None:
    code = (
        "import sys, unispec.checkpoints.demo, unispec.sampling.distribution;"
        "sys.exit('torch' in sys.modules)"
    )
    # The environment is named, because importing max changes it behind Python's back.
    done = subprocess.run([sys.executable, "-c", code], check=False, env=dict(os.environ))
    assert done.returncode == 0
