"""The pages of mapped weight files."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
from gguf import GGMLQuantizationType
from safetensors.numpy import save_file

from unispec.checkpoints import StoredMatrix
from unispec.checkpoints.mapped import forget_pages


def resident_bytes(path: Path) -> int:
    """Of a mapped file, in this process."""
    lines = Path("/proc/self/smaps").read_text().splitlines()
    starts = [at for at, line in enumerate(lines) if line.endswith(f" {path}")]
    sizes = [next(line for line in lines[at:] if line.startswith("Rss:")) for at in starts]
    return sum(int(size.split()[1]) * 1024 for size in sizes)


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells what is resident")
@pytest.mark.parametrize("stored", [False, True])
def test_pages_are_given_back_and_read_again(tmp_path: Path, stored: bool) -> None:
    path = tmp_path / "model.safetensors"
    bytes_ = np.random.default_rng(0).integers(0, 256, (4096, 340), np.uint8)
    save_file({"weight": bytes_}, path)
    array = np.asarray(np.memmap(path, np.uint8, "r"))[-bytes_.size :].reshape(bytes_.shape)
    weight = StoredMatrix(GGMLQuantizationType.Q8_0, (4096, 320), array) if stored else array
    np.testing.assert_array_equal(array, bytes_)
    assert resident_bytes(path) > 0.9 * bytes_.size
    forget_pages([weight, np.zeros(3)])
    assert resident_bytes(path) == 0
    np.testing.assert_array_equal(array, bytes_)


@pytest.mark.parametrize("mode", ["c", "r+"])
def test_what_may_be_changed_stays(tmp_path: Path, mode: str) -> None:
    path = tmp_path / "weights"
    path.write_bytes(bytes(8192))
    array = np.memmap(path, np.uint8, mode)  # type: ignore[call-overload]
    array[:] = 7
    forget_pages([array])
    assert (array == 7).all()
