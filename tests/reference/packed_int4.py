"""Checkpoints packed as compressed-tensors does (`pack-quantized`), value by value in torch.

Format: docs of vllm-project/compressed-tensors; a word holds eight values, the first in its lowest
four bits, each with 8 added.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

__all__ = ["SCHEME", "pack", "packed_parts", "write_packed"]

SCHEME = {
    "quant_method": "compressed-tensors",
    "format": "pack-quantized",
    "quantization_status": "compressed",
    "kv_cache_scheme": None,
    "config_groups": {
        "group_0": {
            "input_activations": None,
            "output_activations": None,
            "targets": ["Linear"],
            "weights": {
                "actorder": None,
                "dynamic": False,
                "group_size": 32,
                "num_bits": 4,
                "observer": "minmax",
                "strategy": "group",
                "symmetric": True,
                "type": "int",
            },
        }
    },
    "ignore": [
        "lm_head",
        "re:.*self_attn.*",
        "re:.*shared_experts.*",
        "re:.*mlp\\.(gate|up|gate_up|down)_proj.*",
    ],
}
"""A `quantization_config` as Kimi K2's published int4 checkpoints have it."""


def pack(values: Tensor) -> Tensor:
    """Words int32 [R, ceil(C / 8)] of values [R, C] from -8 to 7."""
    rows = []
    for row in values.tolist():
        words = []
        for start in range(0, len(row), 8):
            word = sum((value + 8) << (4 * place) for place, value in enumerate(row[start:][:8]))
            words.append(word - (1 << 32) if word >= 1 << 31 else word)
        rows.append(words)
    return torch.tensor(rows, dtype=torch.int32)


def packed_parts(weight: Tensor, group_size: int) -> tuple[dict[str, Tensor], Tensor]:
    """The three parts of a matrix by the ends of their names, and the matrix they stand for."""
    scales, values, meant = [], [], []
    for group in weight.split(group_size, dim=1):
        scale = (group.abs().amax(dim=1, keepdim=True) / 7.5).bfloat16()
        value = (group / scale.float()).round().clamp(-8, 7)
        scales.append(scale)
        values.append(value)
        meant.append(value * scale.float())
    parts = {
        "packed": pack(torch.cat(values, dim=1).int()),
        "scale": torch.cat(scales, dim=1),
        "shape": torch.tensor(weight.shape, dtype=torch.int32),
    }
    return parts, torch.cat(meant, dim=1)


def write_packed(folder: Path, group_size: int, chosen: Callable[[str], bool]) -> dict[str, Tensor]:
    """Packs some matrices of a float32 checkpoint; returns the tensors it then stands for."""
    path = folder / "model.safetensors"
    stored: dict[str, Tensor] = {}
    meant: dict[str, Tensor] = {}
    for name, tensor in load_file(path).items():
        if chosen(name):
            parts, meant[name] = packed_parts(tensor, group_size)
            stored |= {f"{name}_{part}": value for part, value in parts.items()}
        else:
            stored[name] = meant[name] = tensor.clone()
    save_file(stored, path, metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    scheme = json.loads(json.dumps(SCHEME))
    scheme["config_groups"]["group_0"]["weights"]["group_size"] = group_size
    # A model that sees images states it in the part for the text.
    config.get("text_config", config)["quantization_config"] = scheme
    (folder / "config.json").write_text(json.dumps(config))
    return meant
