"""Checkpoints in FP8 blocks as plain ones, block by block.

Format: README_WEIGHTS.md of deepseek-ai/DeepSeek-V3.
"""

from __future__ import annotations

import json
from pathlib import Path

from safetensors.torch import load_file, save_file
from torch import Tensor

__all__ = ["dequantised_tensors", "write_dequantised"]


def dequantised_tensors(folder: Path) -> dict[str, Tensor]:
    """A checkpoint's tensors in float32; those in blocks are multiplied by their scales."""
    stored = load_file(folder / "model.safetensors")
    config = json.loads((folder / "config.json").read_text())
    block = config.get("quantization_config", {}).get("weight_block_size")
    plain: dict[str, Tensor] = {}
    for name, tensor in stored.items():
        if name.endswith("_scale_inv"):
            continue
        wide = plain[name] = tensor.float()
        scales = stored.get(name + "_scale_inv")
        if scales is None:
            continue
        for row in range(scales.shape[0]):
            for column in range(scales.shape[1]):
                top, left = row * block[0], column * block[1]
                wide[top : top + block[0], left : left + block[1]] *= scales[row, column]
    return plain


def write_dequantised(folder: Path, copy: Path) -> Path:
    """Writes a float32 checkpoint with the same model to ``copy`` and returns that."""
    config = json.loads((folder / "config.json").read_text())
    config.pop("quantization_config", None)
    (copy / "config.json").write_text(json.dumps(config))
    save_file(dequantised_tensors(folder), copy / "model.safetensors", metadata={"format": "pt"})
    return copy
