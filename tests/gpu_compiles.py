"""Compiles every documented graph for a GPU that need not be there, and records that it did.

`python tests/gpu_compiles.py` takes one to two hours at first. A graph whose text, weights, MAX
and architecture are those of the record is not compiled again.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

from deepseek_gpus import BLOCKS
from graph_texts import Built, describe, nothing_compiled
from max.driver import (
    DeviceSpec,
    load_devices,
    set_virtual_device_api,
    set_virtual_device_count,
    set_virtual_device_target_arch,
)
from max.engine import InferenceSession
from max.graph.weights import SafetensorWeights
from max.pipelines.lib import PipelineArgs, PipelineConfig
from reference.packed_int4 import write_packed
from tiny import in_fp8_blocks, tiny_deepseek, tiny_dflash, tiny_eagle, tiny_eagle3, tiny_llama
from tiny.kimi import tiny_kimi, tiny_kimi_draft
from transfers import transfers

from unispec.engine import Engine, EngineConfig
from unispec.pipelines.architectures.llama3_modulev3 import Llama3Model

__all__ = ["GRAPHS", "RECORD", "build"]

RECORD = Path(__file__).parent / "data" / "gpu_compiles.json"
_FP8 = "float8_e4m3fn"
_GPU = DeviceSpec(id=0, device_type="gpu")


def _llama(folder: Path) -> Path:
    """Heads as wide as Llama 3's, and rotated as they are."""
    return tiny_llama(
        folder / "target",
        hidden_size=512,
        intermediate_size=1024,
        layers=8,
        heads=8,
        kv_heads=2,
        head_dim=128,
        vocab_size=512,
        tie=False,
        rope="llama3",
        dtype="bfloat16",
        max_position_embeddings=4096,
    )


def _alone(folder: Path, output: Path) -> None:
    target = _llama(folder)
    arguments = PipelineArgs(
        model_path=str(target),
        max_length=512,
        device_specs=[_GPU],
        quantization_encoding="bfloat16",
    )
    config = PipelineConfig.from_args(arguments)
    devices = load_devices([_GPU])
    weights = SafetensorWeights([target / "model.safetensors"])
    session = InferenceSession(devices=devices)
    Llama3Model(config, session, list(devices), config.model.kv_cache, weights)


def _eagle(folder: Path, output: Path) -> None:
    target = _llama(folder)
    _compile(output, target, tiny_eagle(folder / "draft", target), "eagle")


def _eagle3(folder: Path, output: Path) -> None:
    target = _llama(folder)
    _compile(output, target, tiny_eagle3(folder / "draft", target, d2t=256), "eagle3")


def _dflash(folder: Path, output: Path) -> None:
    target = _llama(folder)
    draft = tiny_dflash(
        folder / "draft",
        target,
        layers=2,
        heads=8,
        kv_heads=2,
        head_dim=128,
        block_size=8,
        target_layer_ids=(1, 4, 6),
        mask_token_id=500,
    )
    _compile(output, target, draft, "dflash")


def _mtp(folder: Path, output: Path) -> None:
    target = in_fp8_blocks(tiny_deepseek(folder / "target", **BLOCKS), (128, 128))
    _compile(output, target, None, "mtp")


def _kimi(folder: Path, output: Path) -> None:
    target = tiny_kimi(folder / "target", **{**BLOCKS, "n_group": 1})
    draft = tiny_kimi_draft(folder / "draft", target, folder / "scratch", head_dim=128)
    write_packed(target, 32, lambda name: ".experts." in name and name.endswith(".weight"))
    _compile(output, target, draft, "dflash", quantization_encoding=_FP8)


GRAPHS: Mapping[str, Callable[[Path, Path], None]] = {
    "llama3_modulev3": _alone,
    "unified_eagle_llama3": _eagle,
    "unified_eagle_llama3, EAGLE-3": _eagle3,
    "unified_dflash_llama3": _dflash,
    "unified_mtp_deepseekV3, FP8": _mtp,
    "unified_dflash_kimi_k25, int4 rounded to FP8, with its vision graph": _kimi,
}
"""Each makes a checkpoint in a folder, as wide as GPUs' kernels need it, and compiles its graph."""


def _compile(output: Path, target: Path, draft: Path | None, method: Any, **options: Any) -> None:
    config = EngineConfig(
        model=str(target),
        draft_model=None if draft is None else str(draft),
        speculative_method=method,
        devices="gpu",
        max_length=512,
        **options,
    )
    Engine(config).compile(output)


def build(name: str, folder: Path, architecture: str) -> dict[str, Any]:
    """What a graph for one GPU is, and which copies run in its steps; nothing is compiled."""
    _pretend(architecture)
    with nothing_compiled():
        try:
            GRAPHS[name](folder, folder / "compiled")
        except Built as built:
            graph = describe(built.text, built.weights)
            return {"graph": graph, "transfers": transfers(built.text)}
    raise AssertionError(f"{name} was to be compiled")


def _pretend(architecture: str) -> None:
    set_virtual_device_api("cuda")
    set_virtual_device_target_arch(architecture)
    set_virtual_device_count(1)


def _in_a_process(name: str, architecture: str, *, compiles: bool) -> str:
    """As virtual devices are a setting of the process; returns what it printed."""
    arguments = ["--only", name, "--arch", architecture, *(["--compile"] if compiles else [])]
    script = [sys.executable, __file__, *arguments]
    # Importing MAX changes what a child inherits where it is not given.
    environment = dict(os.environ)
    done = subprocess.run(script, env=environment, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{name} does not {'compile' if compiles else 'build'}")
    return done.stdout


def main(only: str | None, architecture: str, *, compiles: bool) -> None:
    if only is not None:
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            if compiles:
                _pretend(architecture)
                GRAPHS[only](folder, folder / "compiled")
            else:
                print(json.dumps(build(only, folder, architecture)))
        return
    record = json.loads(RECORD.read_text()) if RECORD.exists() else {}
    for graph in GRAPHS:
        key = f"{graph}, {architecture}"
        found = json.loads(_in_a_process(graph, architecture, compiles=False).splitlines()[-1])
        made_of = json.dumps([found["graph"], version("max")])
        digest = hashlib.sha256(made_of.encode()).hexdigest()
        if record.get(key, {}).get("digest") == digest:
            print(f"{key}: compiled before in {record[key]['seconds']} s", flush=True)
            continue
        began = time.monotonic()
        _in_a_process(graph, architecture, compiles=True)
        seconds = round(time.monotonic() - began)
        record[key] = {"digest": digest, "max": version("max"), "seconds": seconds}
        RECORD.write_text(json.dumps(record, indent=1, sort_keys=True) + "\n")
        print(f"{key}: compiled in {seconds} s", flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--arch", default="sm_90a", dest="architecture", help="of the GPU")
    parser.add_argument("--only", choices=GRAPHS, help="print what one graph is")
    parser.add_argument("--compile", action="store_true", dest="compiles", help="compile that one")
    main(**vars(parser.parse_args()))
