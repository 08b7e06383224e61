"""DeepSeek-V3's FP8 blocks through the command: computed in where the GPU can, else dequantised."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from deepseek_gpus import BLOCKS
from tiny import in_fp8_blocks, tiny_deepseek

MATRIX = "target.layers.0.mlp.up_proj.weight"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("command") / "model"
    return in_fp8_blocks(tiny_deepseek(folder, **BLOCKS, rope_interleave=False), (128, 128))


def generate(folder: Path, arch: str, *options: str) -> subprocess.CompletedProcess[str]:
    script = Path(__file__).parent.parent / "virtual_command.py"
    method = ("--speculative-method", "mtp", "--no-chat-template")
    return subprocess.run(
        [sys.executable, str(script), arch, "--model", str(folder), *method, *options],
        env=dict(os.environ),
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.parametrize(
    ("arch", "options", "dtype"),
    [
        ("sm_90a", (), "float8_e4m3fn"),
        ("sm_90a", ("--quantization-encoding", "bfloat16"), "bfloat16"),
    ],
)
def test_the_target_decides_what_is_computed_in(
    folder: Path, arch: str, options: tuple[str, ...], dtype: str
) -> None:
    done = generate(folder, arch, *options)
    assert done.returncode == 0, done.stderr
    built: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    assert built["weights"][MATRIX] == f"{dtype} [256, 128]"
    assert (f"{MATRIX}_scale" in built["weights"]) is (dtype == "float8_e4m3fn")
    # Experts multiply in the same format.
    assert ("f8e4m3fn" in built["text"]) is (dtype == "float8_e4m3fn")


@pytest.mark.parametrize(
    ("arch", "encoding", "message"),
    [
        ("sm_80", "float8_e4m3fn", "the device has no kernels for it; use 'bfloat16' on GPUs"),
        ("sm_90a", "float32", "'float32' of .* does not run on gpu:0; use 'bfloat16'"),
    ],
)
def test_what_the_gpu_cannot_do_is_refused(
    folder: Path, arch: str, encoding: str, message: str
) -> None:
    done = generate(folder, arch, "--quantization-encoding", encoding)
    assert done.returncode == 2
    assert re.search(message, done.stderr), done.stderr
