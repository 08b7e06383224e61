"""Packed blocks, read as the kernels read them: number by number from the layout's description."""

from __future__ import annotations

import logging
import os
import struct
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from gguf import GGMLQuantizationType
from random_blocks import KINDS, random_blocks

from unispec.checkpoints import StoredMatrix
from unispec.kernels import packed_files, packing
from unispec.kernels.packed_files import packed, remove_unused
from unispec.kernels.packing import pack, packed_bytes, packed_chunks, packed_shape

Q8_0, Q4_0, Q4_K, Q5_K, Q6_K = KINDS
Bytes = npt.NDArray[np.uint8]
of_each_kind = pytest.mark.parametrize("kind", KINDS, ids=[kind.name for kind in KINDS])

BLOCKS = {Q8_0: (32, 544), Q4_0: (32, 288), Q4_K: (256, 2368), Q5_K: (256, 2880), Q6_K: (256, 3360)}
"""Columns of a block, and its bytes for 16 rows."""
PARTS = {
    Q8_0: [(1, 2), (8, 4)],
    Q4_0: [(1, 2), (4, 4)],
    Q4_K: [(1, 2), (1, 2), (8, 1), (8, 1), (32, 4)],
    Q5_K: [(1, 2), (1, 2), (8, 1), (8, 1), (40, 4)],
    Q6_K: [(1, 2), (16, 1), (48, 4)],
}
"""What a block has of each row: how many numbers of how many bytes."""


def number(block: bytes, kind: GGMLQuantizationType, row: int, k: int) -> np.float32:
    """The number in column k of a row of a block, by the layout alone."""

    def float16(place: int) -> np.float32:
        return np.float32(struct.unpack_from("<e", block, place + 2 * row)[0])

    def int8(place: int, index: int) -> np.float32:
        return np.float32(struct.unpack_from("b", block, place + 16 * index + row)[0])

    def uint8(place: int, index: int) -> np.float32:
        return np.float32(block[place + 16 * index + row])

    def stored(place: int, k: int) -> int:
        """Byte k of a row, of words of 4 that lie side by side with those of the other rows."""
        return block[place + 64 * (k // 4) + 4 * row + k % 4]

    if kind is Q8_0:
        return float16(0) * np.float32(stored(32, k) - 128)
    if kind is Q4_0:
        return float16(0) * np.float32((stored(32, k % 16) >> 4 * (k // 16) & 15) - 8)
    if kind is Q6_K:
        # 64 columns have 12 words: the upper bits, the first 32 columns and the last 32.
        place, group, j = 288 + 12 * 64 * (k // 64), k // 16 % 4, k % 16
        lower = stored(place + 256 + 256 * (group // 2), j) >> 4 * (group % 2) & 15
        upper = stored(place, j) >> 2 * group & 3
        return float16(0) * int8(32, k // 16) * np.float32((lower | upper << 4) - 32)
    part, j = k // 32, k % 32
    scale, least = float16(0) * uint8(64, part), float16(32) * uint8(192, part)
    halves = 320 + 256 * part + (512 if kind is Q5_K else 0)
    code = stored(halves, j % 16) >> 4 * (j // 16) & 15
    if kind is Q5_K:
        code |= (stored(320, j) >> part & 1) << 4
    return scale * np.float32(code) - least


@of_each_kind
@pytest.mark.parametrize("rows", [1, 16, 35])
def test_each_number_lies_where_the_layout_says(kind: GGMLQuantizationType, rows: int) -> None:
    columns, block_bytes = BLOCKS[kind]
    tensor = random_blocks(kind, rows, 2 * columns, seed=rows)
    tiles = pack(tensor)
    assert tiles.dtype == np.uint8
    assert tiles.shape == (-(-rows // 16), 2 * block_bytes)
    expected = np.zeros((16 * len(tiles), 2 * columns), np.float32)
    expected[:rows] = tensor.floats()
    found = np.empty_like(expected)
    for tile, stored in enumerate(tiles):
        for b in range(2):
            block = stored[b * block_bytes : (b + 1) * block_bytes].tobytes()
            for row in range(16):
                for k in range(columns):
                    place = 16 * tile + row, columns * b + k
                    found[place] = number(block, kind, row, k)
    np.testing.assert_array_equal(found, expected)


@of_each_kind
def test_missing_rows_are_zero_bytes(kind: GGMLQuantizationType) -> None:
    columns, block_bytes = BLOCKS[kind]
    blocks = pack(random_blocks(kind, 3, 4 * columns)).reshape(4, block_bytes)
    begin = 0
    for count, width in PARTS[kind]:
        end = begin + 16 * count * width
        rows = blocks[:, begin:end].reshape(4, count, 16, width)
        assert not rows[:, :, 3:].any()
        assert rows[:, :, :3].any(axis=(0, 1, 3)).all()
        begin = end
    assert begin == block_bytes


@of_each_kind
def test_chunks_are_parts_of_the_whole(
    kind: GGMLQuantizationType, monkeypatch: pytest.MonkeyPatch
) -> None:
    tensor = random_blocks(kind, 100, 512)
    whole = pack(tensor)
    monkeypatch.setattr(packing, "_CHUNK_BYTES", 2 * 16 * tensor.blocks.shape[1])
    chunks = list(packed_chunks(tensor))
    assert [len(chunk) for chunk in chunks] == [2, 2, 2, 1]
    np.testing.assert_array_equal(np.concatenate(chunks), whole)
    np.testing.assert_array_equal(pack(tensor), whole)
    monkeypatch.setattr(packing, "_CHUNK_BYTES", 1)
    assert len(list(packed_chunks(tensor))) == 7
    np.testing.assert_array_equal(pack(tensor), whole)


@of_each_kind
def test_rows_of_a_view_and_of_read_only_bytes(kind: GGMLQuantizationType) -> None:
    tensor = random_blocks(kind, 64, 256)
    tensor.blocks.flags.writeable = False
    turned = tensor[::-1]
    copied = StoredMatrix(kind, turned.shape, turned.blocks.copy())
    np.testing.assert_array_equal(pack(turned), pack(copied))
    beside = np.concatenate([tensor.blocks, tensor.blocks], axis=1)[:, : tensor.blocks.shape[1]]
    np.testing.assert_array_equal(pack(StoredMatrix(kind, tensor.shape, beside)), pack(tensor))


@of_each_kind
def test_sizes(kind: GGMLQuantizationType) -> None:
    columns, block_bytes = BLOCKS[kind]
    assert packed_shape(kind, (33, 3 * columns)) == (3, 3 * block_bytes)
    assert packed_bytes(kind, (33, 3 * columns)) == 9 * block_bytes
    assert packed_bytes(kind, (32, columns)) == 2 * block_bytes


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("UNISPEC_CACHE", str(tmp_path))
    packed_files._warn.cache_clear()
    return tmp_path / "packed"


@pytest.fixture(scope="module")
def large() -> StoredMatrix:
    return random_blocks(Q8_0, 2000, 512, origin="a file")


def mapped(array: Bytes) -> bool:
    """Whether an array is a view of a file."""
    base: object = array
    while isinstance(base, np.ndarray):
        if isinstance(base, np.memmap):
            return True
        base = base.base
    return False


def test_a_packed_matrix_is_written_once_and_mapped(
    folder: Path, large: StoredMatrix, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = packed(large)
    [path] = folder.iterdir()
    assert path.read_bytes() == pack(large).tobytes()
    assert path.suffix == ".bin"
    written = path.stat().st_ino

    def fail(tensor: StoredMatrix) -> None:
        raise AssertionError("packed again")

    monkeypatch.setattr(packed_files, "packed_chunks", fail)
    monkeypatch.setattr(packed_files, "pack", fail)
    second = packed(large)
    for array in (first, second):
        assert mapped(array)
        assert not array.flags.writeable
        assert array.shape == packed_shape(Q8_0, large.shape)
        np.testing.assert_array_equal(array.reshape(-1), np.fromfile(path, np.uint8))
    assert list(folder.iterdir()) == [path]
    assert path.stat().st_ino == written


def test_what_is_another_matrix_has_another_file(
    folder: Path, large: StoredMatrix, monkeypatch: pytest.MonkeyPatch
) -> None:
    origin = large.origin
    packed(large)
    packed(StoredMatrix(Q8_0, large.shape, large.blocks, "another file"))
    packed(StoredMatrix(Q8_0, (1999, 512), large.blocks[:1999], origin))
    packed(random_blocks(Q6_K, 2000, 1024, origin=origin))
    assert len(list(folder.iterdir())) == 4
    monkeypatch.setattr(packed_files, "LAYOUT", packing.LAYOUT + 1)
    packed(large)
    assert len(list(folder.iterdir())) == 5


def test_small_matrices_and_those_of_no_origin_stay_in_memory(
    folder: Path, large: StoredMatrix
) -> None:
    for tensor in (
        StoredMatrix(Q8_0, large.shape, large.blocks),
        random_blocks(Q8_0, 16, 512, origin="a file"),
    ):
        array = packed(tensor)
        assert not mapped(array)
        np.testing.assert_array_equal(array, pack(tensor))
    assert not folder.exists()


def test_files_that_nobody_uses_are_removed(folder: Path, large: StoredMatrix) -> None:
    def file(origin: str) -> Path:
        before = set(folder.glob("*"))
        packed(replace(large, origin=origin))
        [path] = set(folder.iterdir()) - before
        return path

    remove_unused()
    now, day = time.time(), 24 * 3600
    old, used, recent = file("old"), file("used"), file("recent")
    for path, age in ((old, 31), (used, 31), (recent, 29)):
        os.utime(path, (now - age * day, now - age * day))
    packed(replace(large, origin="used"))
    assert old.exists()
    remove_unused()
    assert set(folder.iterdir()) == {used, recent}


def test_a_file_of_another_size_is_written_again(folder: Path, large: StoredMatrix) -> None:
    packed(large)
    [path] = folder.iterdir()
    path.write_bytes(b"cut off")
    np.testing.assert_array_equal(packed(large), pack(large))
    assert path.stat().st_size == packed_bytes(Q8_0, large.shape)


def test_a_folder_that_cannot_be_made(
    folder: Path, large: StoredMatrix, caplog: pytest.LogCaptureFixture
) -> None:
    """One warning says so, however many matrices there are."""
    folder.write_text("a file in its place")
    with caplog.at_level(logging.WARNING):
        for tensor in (large, random_blocks(Q4_K, 2000, 1024, origin="a file")):
            array = packed(tensor)
            assert not mapped(array)
            np.testing.assert_array_equal(array, pack(tensor))
    assert [record.message for record in caplog.records] == [
        f"{folder} cannot be written (File exists), so weights are packed at every start: make"
        " room, or set UNISPEC_CACHE to another folder"
    ]


def test_a_full_disk_leaves_nothing_behind(
    folder: Path,
    large: StoredMatrix,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    def full(handle: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with caplog.at_level(logging.WARNING):
        np.testing.assert_array_equal(packed(large), pack(large))
    assert "No space left on device" in caplog.text
    assert list(folder.iterdir()) == []
