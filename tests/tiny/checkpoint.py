"""Random tensors and how a checkpoint folder is written."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from safetensors.torch import load_file, save_file

__all__ = ["Array", "decoder_layer", "linear", "norm", "read", "write"]

Array = npt.NDArray[Any]

GAIN = 1.5
"""Standard deviation of a projection's output for inputs of standard deviation 1."""


def linear(rng: np.random.Generator, out_features: int, in_features: int) -> Array:
    """A random projection [out_features, in_features] that scales its input by ``GAIN``."""
    return rng.normal(0, GAIN * in_features**-0.5, (out_features, in_features))


def norm(rng: np.random.Generator, size: int) -> Array:
    """A norm weight [size] that is close to 1 but not 1."""
    return rng.normal(1, 0.1, size)


def decoder_layer(
    rng: np.random.Generator, config: Mapping[str, Any], index: int, *, input_norm: bool = True
) -> dict[str, Array]:
    """The tensors of Llama decoder layer ``index`` under their HF names."""
    hidden, intermediate = config["hidden_size"], config["intermediate_size"]
    q_width = config["num_attention_heads"] * config["head_dim"]
    kv_width = config["num_key_value_heads"] * config["head_dim"]
    attention = {
        "q_proj": (q_width, hidden),
        "k_proj": (kv_width, hidden),
        "v_proj": (kv_width, hidden),
        "o_proj": (hidden, q_width),
    }
    tensors = {f"self_attn.{name}.weight": linear(rng, *shape) for name, shape in attention.items()}
    if config["attention_bias"]:
        tensors |= {
            f"self_attn.{name}.bias": rng.normal(0, 0.2, shape[0])
            for name, shape in attention.items()
        }
    tensors["mlp.gate_proj.weight"] = linear(rng, intermediate, hidden)
    tensors["mlp.up_proj.weight"] = linear(rng, intermediate, hidden)
    tensors["mlp.down_proj.weight"] = linear(rng, hidden, intermediate)
    if input_norm:
        tensors["input_layernorm.weight"] = norm(rng, hidden)
    tensors["post_attention_layernorm.weight"] = norm(rng, hidden)
    return {f"layers.{index}.{name}": tensor for name, tensor in tensors.items()}


def write(folder: Path, config: Mapping[str, Any], tensors: Mapping[str, Array]) -> Path:
    """Writes ``config.json`` and ``model.safetensors``; floats take the config's ``dtype``."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    dtype: torch.dtype = getattr(torch, config["dtype"])
    stored = {
        name: torch.from_numpy(array).to(dtype if array.dtype.kind == "f" else torch.int64)
        for name, array in tensors.items()
    }
    save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def read(folder: Path) -> tuple[dict[str, Any], dict[str, Array]]:
    """The config and the tensors of a checkpoint, floats as float64."""
    config = json.loads((folder / "config.json").read_text())
    stored = load_file(folder / "model.safetensors")
    return config, {
        name: (t.double() if t.is_floating_point() else t).numpy() for name, t in stored.items()
    }
