"""Matrices that stay in float16 and bfloat16: read, checked and compared as torch has them."""

from __future__ import annotations

import dataclasses
import json
import os
import struct
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType
from gguf_files import gguf_name, refused, tiny_llama, write_gguf
from max.dtype import DType
from random_blocks import random_blocks
from safetensors.torch import save_file

from unispec.checkpoints import (
    StoredMatrix,
    Tensor,
    check_weight_files,
    memory,
    read_gguf,
    read_tensors,
)
from unispec.checkpoints.cast import cast_weights
from unispec.checkpoints.halves import half_bytes
from unispec.checkpoints.rounding import is_rounded
from unispec.checkpoints.stored import as_floats
from unispec.checkpoints.tensors import bytes_held
from unispec.checkpoints.tied_head import EMBEDDING, HEAD, same_rows, tied_names
from unispec.checkpoints.validation import validated_state_dict
from unispec.pipelines.runtime.weights import read_weights

F16, BF16 = GGMLQuantizationType.F16, GGMLQuantizationType.BF16
DTYPES = {F16: torch.float16, BF16: torch.bfloat16}
SOURCE = "a.safetensors"
of_both = pytest.mark.parametrize("kind", [F16, BF16], ids=["F16", "BF16"])


def stored(tensor: torch.Tensor) -> StoredMatrix:
    """A matrix of torch in its own format."""
    kind = {dtype: kind for kind, dtype in DTYPES.items()}[tensor.dtype]
    rows, columns = tensor.shape
    data = tensor.contiguous().view(torch.uint8).numpy().reshape(rows, 2 * columns)
    return StoredMatrix(kind, (rows, columns), data)


def matrix(kind: GGMLQuantizationType, rows: int = 6, columns: int = 5) -> torch.Tensor:
    generator = torch.Generator().manual_seed(rows)
    return torch.randn(rows, columns, generator=generator).to(DTYPES[kind])


def every_pattern(kind: GGMLQuantizationType) -> torch.Tensor:
    bits = torch.arange(2**16, dtype=torch.int32).to(torch.int16)
    return bits.view(DTYPES[kind]).reshape(256, 256)


@of_both
def test_every_bit_pattern_is_torchs_number(kind: GGMLQuantizationType) -> None:
    tensor = every_pattern(kind)
    np.testing.assert_array_equal(stored(tensor).floats(), tensor.float().numpy())


@of_both
def test_float32_is_rounded_as_torch_rounds(kind: GGMLQuantizationType) -> None:
    """To nearest, ties to even, up to infinity; ties are more than random bits would have."""
    bits = np.random.default_rng(1).integers(0, 2**32, (400, 256), np.uint32)
    bits[:100] = bits[:100] & 0xFFFF0000 | 0x8000  # Ties of bfloat16,
    bits[100:200] = bits[100:200] & 0xFFFFE000 | 0x1000  # ... and of float16
    bits[150:200] = bits[150:200] & 0x8FFFFFFF | 0x30000000  # ... around 1e-9 to 0.5
    floats = bits.view(np.float32)
    numbers = np.where(np.isnan(floats), np.float32(0), floats)
    expected = torch.from_numpy(numbers).to(DTYPES[kind]).view(torch.int16).numpy()
    np.testing.assert_array_equal(half_bytes(numbers, kind).view(np.int16), expected)


def test_bfloat16_by_hand() -> None:
    """8 bits of a number remain; of two that are as near, the one whose last bit is 0."""
    numbers = np.array([[1, 1 + 2**-8, 1 + 3 * 2**-8, -(1 + 3 * 2**-8), 1 + 2**-8 + 2**-20]])
    bits = half_bytes(numbers.astype(np.float32), BF16).view(np.uint16)
    assert [hex(number) for number in bits[0]] == ["0x3f80", "0x3f80", "0x3f82", "0xbf82", "0x3f81"]


@of_both
@pytest.mark.parametrize("bits", [0x7F800001, 0xFFFFFFFF, 0x7FC00000, 0xFF800001])
def test_nan_stays_nan(kind: GGMLQuantizationType, bits: int) -> None:
    number = np.array([[bits]], np.uint32).view(np.float32)
    assert np.isnan(StoredMatrix(kind, (1, 1), half_bytes(number, kind)).floats()).all()


@of_both
def test_it_is_like_an_array_of_its_numbers(kind: GGMLQuantizationType) -> None:
    tensor = matrix(kind)
    numbers, ours = tensor.float().numpy(), stored(tensor)
    assert (ours.ndim, ours.shape, len(ours), ours.size) == (2, (6, 5), 6, 30)
    assert ours.dtype == np.float32
    assert not ours.is_quantised
    for rows in (slice(1, 3), slice(3, 99), slice(None, None, -2), np.array([4, 0, 4]), slice(0)):
        taken = ours[rows]
        assert taken.kind is kind
        np.testing.assert_array_equal(taken.floats(), numbers[rows])
    order = np.array([5, 2, 0, 1, 4, 3])
    moved = dataclasses.replace(ours, origin="a file").reordered(order, "turned")
    np.testing.assert_array_equal(moved.floats(), numbers[order])
    assert moved.origin == "a file, turned"
    np.testing.assert_array_equal(as_floats(ours), numbers)
    np.testing.assert_array_equal(cast_weights({"w": ours}, DType.float32)["w"], numbers)


@pytest.mark.parametrize("shape", [(1, 4), (2, 3), (0, 8)])
def test_bytes_of_another_shape(shape: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match=r"has uint8 of shape"):
        StoredMatrix(BF16, (1, 3), np.zeros(shape, np.uint8))


def tensors_of_a_file() -> dict[str, torch.Tensor]:
    """What stays as it is, and what does not: vectors, other names, numbers of 4 bytes."""
    return {
        "model.a.weight": matrix(BF16),
        "b.weight": matrix(F16),
        "norm.weight": matrix(BF16)[0].clone(),
        "half_norm.weight": matrix(F16)[0].clone(),
        "stack.weight": matrix(BF16).reshape(2, 3, 5),
        "table": matrix(BF16),
        "c.weight": matrix(BF16).float(),
        "d2t": torch.arange(6),
    }


STAY = {"model.a.weight": BF16, "b.weight": F16}


def mapped_file(array: Any) -> np.memmap[Any, Any]:
    while not isinstance(array, np.memmap):
        array = array.base
    return array


def test_matrices_of_safetensors_stay_in_the_mapped_file(tmp_path: Path) -> None:
    written = tensors_of_a_file()
    path = tmp_path / SOURCE
    save_file(written, path)
    read, plain = read_tensors([path], as_stored=True), read_tensors([path])
    assert read.keys() == plain.keys() == written.keys()
    for name, tensor in written.items():
        ours = read[name]
        if name not in STAY:
            assert isinstance(ours, np.ndarray)
            assert ours.dtype == plain[name].dtype
            np.testing.assert_array_equal(ours, plain[name])
            continue
        assert isinstance(ours, StoredMatrix)
        assert (ours.kind, ours.shape, ours.origin) == (STAY[name], (6, 5), None)
        assert ours.blocks.tobytes() == tensor.view(torch.uint8).numpy().tobytes()
        assert np.shares_memory(ours.blocks, mapped_file(ours.blocks))
        np.testing.assert_array_equal(ours.floats(), plain[name].astype(np.float32))
    # Nothing was read ahead: what is written to the file now is what the matrix has.
    with path.open("r+b") as file:
        start = path.read_bytes().index(written["b.weight"].view(torch.uint8).numpy().tobytes())
        file.seek(start)
        file.write(np.float16(7).tobytes())
    assert as_floats(read["b.weight"])[0, 0] == 7


def test_without_it_all_are_arrays(tmp_path: Path) -> None:
    save_file(tensors_of_a_file(), tmp_path / SOURCE)
    read = read_tensors([tmp_path / SOURCE])
    assert all(isinstance(tensor, np.ndarray) for tensor in read.values())
    assert {read["model.a.weight"].dtype.name, read["b.weight"].dtype.name} == {
        "float32",
        "float16",
    }


@of_both
def test_unaligned_matrices_are_copied(kind: GGMLQuantizationType, tmp_path: Path) -> None:
    tensor = matrix(kind)
    header = json.dumps(
        {
            "byte": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]},
            "w.weight": {"dtype": kind.name, "shape": [6, 5], "data_offsets": [1, 61]},
        }
    ).encode()
    header += b" " * (-len(header) % 8)
    data = b"\x07" + tensor.view(torch.uint8).numpy().tobytes()
    path = tmp_path / SOURCE
    path.write_bytes(struct.pack("<Q", len(header)) + header + data)
    ours = read_tensors([path], as_stored=True)["w.weight"]
    assert isinstance(ours, StoredMatrix)
    assert ours.blocks.view("<u2").flags.aligned
    np.testing.assert_array_equal(ours.floats(), tensor.float().numpy())


@of_both
def test_a_number_takes_2_bytes(
    kind: GGMLQuantizationType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A vector of 5 takes 4 bytes a number, as does a matrix of another name."""
    tensors = {
        "a.weight": matrix(kind),
        "norm.weight": matrix(kind)[0].clone(),
        "table": matrix(kind),
    }
    path = tmp_path / SOURCE
    save_file(tensors, path)
    needed = 2 * 30 + 4 * 5 + 4 * 30
    assert bytes_held([path], as_stored=True) == needed
    assert bytes_held([path]) == 4 * 65
    monkeypatch.setattr(memory, "available_memory", lambda: needed)
    read_tensors([path], as_stored=True)
    with refused(SOURCE, "of memory, numbers as float32, and"):
        read_tensors([path])
    monkeypatch.setattr(memory, "available_memory", lambda: needed - 1)
    for look in (check_weight_files, read_tensors):
        with refused(SOURCE, "of memory, numbers as stored or as float32, and"):
            look([path], as_stored=True)


def test_no_memory_is_taken_for_a_large_matrix(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a file with holes, which has no room on the disk either."""
    entry = {"dtype": "BF16", "shape": [10**6, 40000], "data_offsets": [0, 8 * 10**10]}
    header = json.dumps({"w.weight": entry}).encode()
    header += b" " * (-len(header) % 8)
    path = tmp_path / SOURCE
    path.write_bytes(struct.pack("<Q", len(header)) + header)
    os.truncate(path, path.stat().st_size + 8 * 10**10)
    monkeypatch.setattr(memory, "available_memory", lambda: 8 * 10**10)
    ours = read_tensors([path], as_stored=True)["w.weight"]
    assert isinstance(ours, StoredMatrix)
    np.testing.assert_array_equal(ours[-2:].floats(), np.zeros((2, 40000)))


def checked(tensor: StoredMatrix, shape: tuple[int, int]) -> dict[str, StoredMatrix]:
    names = {"w.weight": "model.w.weight"}
    return validated_state_dict(
        {"model.w.weight": tensor}, names, {"w.weight": shape}, source=SOURCE, model="a model"
    )


@of_both
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_numbers_that_are_not_finite(kind: GGMLQuantizationType, value: float) -> None:
    tensor = matrix(kind, 600, 300)
    ours = stored(tensor)
    assert checked(ours, (600, 300)) == {"w.weight": ours}
    tensor[[0, 599, 599], [0, 1, 299]] = value
    assert ours.bad_numbers() == 3
    words = "has 3 NaN or infinite values, expected none: download or convert"
    with refused(SOURCE, "'model.w.weight'", words):
        checked(ours, (600, 300))
    with refused(SOURCE, "has shape [600, 300], expected [300, 600]"):
        checked(ours, (300, 600))


def test_all_that_is_not_finite_is_found() -> None:
    """All patterns whose exponent is all ones: two signs, and 7 or 10 bits behind."""
    assert stored(every_pattern(BF16)).bad_numbers() == 2 * 2**7
    assert stored(every_pattern(F16)).bad_numbers() == 2 * 2**10
    assert stored(matrix(F16))[:0].bad_numbers() == 0


def test_same_rows_have_the_same_numbers_in_whatever_format() -> None:
    whole = torch.arange(-5000, 5000).reshape(5000, 2) % 128
    bf16, f16 = stored(whole.to(torch.bfloat16)), stored(whole.to(torch.float16))
    for one in (bf16, f16, bf16.floats(), f16.floats().astype(np.float16)):
        for other in (bf16, f16, bf16.floats().astype(np.float64)):
            assert same_rows(one, other)
            assert not same_rows(one, other[:4999])
    other = whole.clone()
    other[-1, -1] += 1
    for dtype in (torch.bfloat16, torch.float16):
        assert not same_rows(bf16, stored(other.to(dtype)))
        assert not same_rows(stored(other.to(dtype)).floats(), f16)
    # The bytes of both are equal, and their numbers are not.
    assert not same_rows(bf16, dataclasses.replace(bf16, kind=F16))


def test_halves_are_no_blocks() -> None:
    blocks = random_blocks(GGMLQuantizationType.Q8_0, 3, 32)
    halves = stored(torch.from_numpy(blocks.floats()).half())
    assert not same_rows(blocks, halves)
    assert not same_rows(halves, blocks)


def test_a_head_is_tied_where_its_numbers_are_the_embeddings() -> None:
    names = {EMBEDDING: EMBEDDING, HEAD: HEAD}
    rows = matrix(BF16)
    tied = {EMBEDDING: EMBEDDING}
    assert tied_names({EMBEDDING: stored(rows), HEAD: stored(rows.clone())}, names) == tied
    assert tied_names({EMBEDDING: stored(rows), HEAD: rows.float().numpy()}, names) == tied
    assert tied_names({EMBEDDING: stored(rows), HEAD: stored(rows + 1)}, names) == names


@of_both
def test_a_copy_is_the_same_once_it_is_rounded(kind: GGMLQuantizationType) -> None:
    numbers = torch.randn(4100, 8, generator=torch.Generator().manual_seed(5))
    ours = stored(numbers.to(DTYPES[kind]))
    exact: Tensor = numbers.numpy()
    assert is_rounded(exact, ours)
    assert is_rounded(exact.astype(np.float64), ours)
    assert is_rounded(ours.floats(), ours)
    assert is_rounded(ours, ours)
    assert not is_rounded(exact[:4099], ours)
    other = exact.copy()
    other[-1, -1] *= 1.01
    assert not is_rounded(other, ours)
    assert not is_rounded(np.full_like(exact, np.nan), ours)
    assert not is_rounded(np.full_like(exact, 1e30), ours)


@of_both
def test_matrices_of_a_gguf_stay_in_hugging_faces_order_of_rows(
    kind: GGMLQuantizationType, tmp_path: Path
) -> None:
    model = tiny_llama()
    path = write_gguf(tmp_path / "a.gguf", model, kind=kind)
    kept = read_gguf(path, as_stored=True).tensors
    parameters = dict(model.named_parameters())
    assert kept.keys() == parameters.keys()
    for name, parameter in parameters.items():
        tensor = kept[name]
        if parameter.ndim == 1:
            assert isinstance(tensor, np.ndarray)
            np.testing.assert_array_equal(tensor, parameter.detach().numpy())
            continue
        assert isinstance(tensor, StoredMatrix)
        assert tensor.kind is kind
        expected = parameter.detach().to(DTYPES[kind])
        assert tensor.blocks.tobytes() == expected.view(torch.uint8).numpy().tobytes(), name
        is_moved = "q_proj" in name or "k_proj" in name
        assert tensor.blocks.flags.owndata is is_moved
        if not is_moved:
            assert mapped_file(tensor.blocks).filename == path
        assert tensor.origin is not None


@of_both
def test_of_a_gguf_under_its_own_names(kind: GGMLQuantizationType, tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "a.gguf", kind=kind)
    parameters = {gguf_name(name): p for name, p in tiny_llama().named_parameters()}
    read = read_tensors([path], as_stored=True)
    assert read.keys() == parameters.keys()
    output = read["output.weight"]
    assert isinstance(output, StoredMatrix)
    expected = parameters["output.weight"].detach().to(DTYPES[kind]).float()
    np.testing.assert_array_equal(output.floats(), expected.numpy())
    matrices = sum(p.numel() for p in parameters.values() if p.ndim == 2)
    vectors = sum(p.numel() for p in parameters.values() if p.ndim == 1)
    assert bytes_held([path], as_stored=True) == 2 * matrices + 4 * vectors
    assert bytes_held([path]) == 4 * (matrices + vectors)


def test_a_format_that_does_not_stay_is_widened(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "a.gguf", kind=GGMLQuantizationType.Q5_0)
    tensor = read_tensors([path], as_stored=True)["output.weight"]
    assert isinstance(tensor, np.ndarray)
    weight = tiny_llama().lm_head.weight.detach().numpy()
    blocks = gguf.quantize(weight, GGMLQuantizationType.Q5_0)
    np.testing.assert_array_equal(tensor, gguf.dequantize(blocks, GGMLQuantizationType.Q5_0))


@pytest.mark.parametrize("kept", [False, True])
def test_a_pipelines_weights_stay_where_that_is_asked_for(kept: bool, tmp_path: Path) -> None:
    path = tmp_path / SOURCE
    save_file({"a.weight": matrix(BF16)}, path)
    model: Any = SimpleNamespace(resolved_weight_paths=lambda: [path], model_name="a model")
    tensors, source = read_weights(model, as_stored=kept)
    assert source == "a model"
    assert isinstance(tensors["a.weight"], StoredMatrix if kept else np.ndarray)
    np.testing.assert_array_equal(as_floats(tensors["a.weight"]), matrix(BF16).float().numpy())
