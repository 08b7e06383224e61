"""Graphs for a GPU through the command: Llama with each draft, and DeepSeek-V3's FP8 blocks, which
are computed in where the GPU can, and else dequantised."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from deepseek_gpus import BLOCKS
from reference.packed_int4 import write_packed
from tiny import TinyPair, in_fp8_blocks, tiny_deepseek
from tiny.kimi import tiny_kimi, tiny_kimi_draft

MATRIX = "target.layers.0.mlp.up_proj.weight"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("command") / "model"
    return in_fp8_blocks(tiny_deepseek(folder, **BLOCKS, rope_interleave=False), (128, 128))


def generate(
    folder: Path, arch: str, *options: str, method: str = "mtp"
) -> subprocess.CompletedProcess[str]:
    chosen = ("--speculative-method", method, "--no-chat-template")
    return run("generate", arch, "--model", str(folder), *chosen, *options)


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    script = Path(__file__).parent.parent / "virtual_command.py"
    return subprocess.run(
        [sys.executable, str(script), *arguments],
        env=dict(os.environ),
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.parametrize(
    ("arch", "options", "dtype"),
    [
        ("sm_90a", (), "float8_e4m3fn"),
        ("sm_100a", ("--quantization-encoding", "bfloat16"), "bfloat16"),
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


@pytest.mark.parametrize("name", ["llama_eagle", "llama_eagle3_sampled", "llama_dflash_agreeing"])
def test_a_llama_and_its_draft_are_built_for_a_gpu(
    tiny_pair: Callable[[str], TinyPair], name: str
) -> None:
    pair = tiny_pair(name)
    assert pair.method is not None
    draft = ("--draft-model-path", str(pair.draft))
    done = generate(pair.target, "sm_90a", *draft, method=pair.method)
    assert done.returncode == 0, done.stderr
    built: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    # Token numbers of the draft's vocabulary are the only others.
    formats = {kind.split()[0] for kind in built["weights"].values()}
    assert formats <= {"bfloat16", "int64"}
    assert "unispec_" not in built["text"]
    products = re.findall(r"mo\.matmul[^\n]*-> !mo\.tensor<[^>]*>", built["text"])
    assert products
    assert all("gpu:0" in product for product in products)


@pytest.mark.parametrize("arch", ["sm_90a", "sm_100a"])
def test_a_kimi_its_tower_and_its_draft_are_built_for_a_gpu(tmp_path: Path, arch: str) -> None:
    """Packed int4, for which GPUs have no kernels: FP8 where it is asked for, else bfloat16."""
    target = tiny_kimi(tmp_path / "target", **{**BLOCKS, "n_group": 1})
    draft = tiny_kimi_draft(tmp_path / "draft", target, tmp_path / "scratch", head_dim=128)
    write_packed(target, 32, lambda name: ".experts." in name and "proj" in name)
    fp8 = ("--quantization-encoding", "float8_e4m3fn") if arch == "sm_90a" else ()
    done = generate(target, arch, "--draft-model-path", str(draft), *fp8, method="dflash")
    assert done.returncode == 0, done.stderr
    built: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    weights = {name: kind.split()[0] for name, kind in built["weights"].items()}
    expert = "target.layers.1.mlp.experts.0.up_proj.weight"
    assert weights[expert] == ("float8_e4m3fn" if fp8 else "bfloat16")
    assert (f"{expert}_scale" in weights) is bool(fp8)
    # Tower, draft and head are never in FP8.
    others = {kind for name, kind in weights.items() if not name.startswith("target.layers.")}
    assert others == {"bfloat16"}
    assert "@kimik2_5_vision" in built["text"]


def test_a_graph_is_compiled_for_a_gpu_as_it_is_on_one(
    tiny_pair: Callable[[str], TinyPair], tmp_path: Path
) -> None:
    pair = tiny_pair("llama_eagle")
    assert pair.method is not None
    there = generate(pair.target, "sm_90a", "--draft-model-path", str(pair.draft), method="eagle")
    model = ("--model", str(pair.target), "--draft-model-path", str(pair.draft))
    output = ("--speculative-method", "eagle", "-o", str(tmp_path / "graph"))
    here = run("compile", "sm_90a", *model, *output)
    assert here.returncode == 0, here.stderr
    texts = [json.loads(done.stdout.splitlines()[-1])["text"] for done in (here, there)]
    assert texts[0] == texts[1]
    assert not (tmp_path / "graph").exists()  # nothing was compiled


@pytest.mark.parametrize(
    ("arch", "encoding", "message"),
    [
        ("sm_80", "float8_e4m3fn", "the device has no kernels for it; use 'bfloat16' on GPUs"),
        ("sm_90a", "float32", "'float32' of .* does not run on gpu:0; use 'float8_e4m3fn'"),
        ("sm_90a", "bfloat16", "'bfloat16' of .* does not run on gpu:0; use 'float8_e4m3fn'"),
    ],
)
def test_what_the_gpu_cannot_do_is_refused(
    folder: Path, arch: str, encoding: str, message: str
) -> None:
    done = generate(folder, arch, "--quantization-encoding", encoding)
    assert done.returncode == 2
    assert re.search(message, done.stderr), done.stderr
