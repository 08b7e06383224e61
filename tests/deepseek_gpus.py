"""DeepSeek-V3 for GPUs that are not there: shapes of checkpoints, and how graphs are built."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from graph_texts import RECORDED
from max.graph import DeviceRef
from max.pipelines.context import TextContext, TokenBuffer

from unispec.engine import EngineConfig
from unispec.engine.pipeline_config import make_pipeline_config
from unispec.pipelines.targets.deepseek.config import DeepseekV3Config

__all__ = [
    "BLOCKS",
    "CPU",
    "GPUS",
    "LAYERS",
    "SHAPE",
    "assert_recorded",
    "build",
    "on_gpus",
    "rows",
]

LAYERS = 3
SHAPE: dict[str, Any] = {
    "q_lora_rank": 24,
    "n_routed_experts": 8,
    "n_group": 2,
    "topk_group": 1,
    "num_experts_per_tok": 2,
    "layers": LAYERS,
    "first_k_dense_replace": 1,
    "rope": "yarn",
    "heads": 8,
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
}
"""Attention as wide as the kernels for GPUs need it, all else tiny."""

BLOCKS: dict[str, Any] = {
    **SHAPE,
    "q_lora_rank": 128,
    "hidden_size": 128,
    "moe_intermediate_size": 256,
}
"""Of whole FP8 blocks, also where two devices share them."""

CPU, GPUS = DeviceRef.CPU(), [DeviceRef.GPU(index) for index in range(8)]


def build(count: int, folder: Path, parallelism: str, *options: str) -> dict[str, Any]:
    script = Path(__file__).parent / "virtual_gpus.py"
    done = subprocess.run(
        [sys.executable, str(script), str(count), str(folder), parallelism, *options],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    described: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return described


def assert_recorded(graphs: dict[str, Any], name: str) -> None:
    """Asserts that the graphs are those of this name in `graph_texts.VIRTUAL`."""
    expected = json.loads(RECORDED.read_text())
    for part, found in graphs["recorded"].items():
        assert found == expected[f"{name}: {part}"], part


def on_gpus(folder: Path, count: int = 1, **changes: Any) -> DeepseekV3Config:
    """The configuration as GPUs would have it; its graph cannot be built in this process."""
    config = DeepseekV3Config.initialize(
        make_pipeline_config(EngineConfig(model=str(folder), max_length=64))
    )
    return replace(config, devices=GPUS[:count], **changes)


def rows(*lengths: int) -> list[TextContext]:
    return [
        TextContext(max_length=512, tokens=TokenBuffer(np.arange(length, dtype=np.int64)))
        for length in lengths
    ]
