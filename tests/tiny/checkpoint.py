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

__all__ = ["Array", "as_llama", "decoder_layer", "linear", "norm", "read", "write"]

Array = npt.NDArray[Any]

LLAMA_FIELDS = (
    "architectures",
    "model_type",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "vocab_size",
    "max_position_embeddings",
    "tie_word_embeddings",
    "attention_bias",
    "mlp_bias",
    "hidden_act",
    "rms_norm_eps",
    "rope_theta",
    "rope_scaling",
    "bos_token_id",
    "eos_token_id",
    "dtype",
)
"""What a config of transformers' Llama states."""

GAIN = 1.5
"""Standard deviation of a projection's output for inputs of standard deviation 1."""


def linear(rng: np.random.Generator, out_features: int, in_features: int) -> Array:
    """A random projection [out_features, in_features] that scales its input by ``GAIN``."""
    return rng.normal(0, GAIN * in_features**-0.5, (out_features, in_features))


def norm(rng: np.random.Generator, size: int) -> Array:
    """A norm weight [size] that is close to 1 but not 1."""
    return rng.normal(1, 0.1, size)


def as_llama(config: Mapping[str, Any]) -> dict[str, Any]:
    """The config of Llama layers of a target's size, as its drafts have, whatever the target is."""
    heads = {"head_dim": config["hidden_size"] // config["num_attention_heads"]}
    fields = {"attention_bias": False, "mlp_bias": False, "rope_scaling": None} | heads
    fields |= {name: value for name, value in config.items() if name in LLAMA_FIELDS}
    return fields | {"model_type": "llama"}


def decoder_layer(
    rng: np.random.Generator, config: Mapping[str, Any], index: int, *, input_norm: bool = True
) -> dict[str, Array]:
    """The tensors of decoder layer ``index`` under their HF names, as its model type has them."""
    model_type, config = config["model_type"], as_llama(config)
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
    biased = list(attention) if config["attention_bias"] else []
    if model_type == "qwen2":
        biased = ["q_proj", "k_proj", "v_proj"]
    tensors |= {f"self_attn.{name}.bias": rng.normal(0, 0.2, attention[name][0]) for name in biased}
    tensors["mlp.gate_proj.weight"] = linear(rng, intermediate, hidden)
    tensors["mlp.up_proj.weight"] = linear(rng, intermediate, hidden)
    tensors["mlp.down_proj.weight"] = linear(rng, hidden, intermediate)
    if input_norm:
        tensors["input_layernorm.weight"] = norm(rng, hidden)
    tensors["post_attention_layernorm.weight"] = norm(rng, hidden)
    if model_type == "qwen3":
        tensors["self_attn.q_norm.weight"] = norm(rng, config["head_dim"])
        tensors["self_attn.k_norm.weight"] = norm(rng, config["head_dim"])
    return {f"layers.{index}.{name}": tensor for name, tensor in tensors.items()}


def write(folder: Path, config: Mapping[str, Any], tensors: Mapping[str, Array]) -> Path:
    """Writes ``config.json`` and ``model.safetensors``; floats take the config's ``dtype``."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    dtype: torch.dtype = getattr(torch, config["dtype"])
    stored = {
        name: torch.from_numpy(array).to({"f": dtype, "b": torch.bool}.get(kind, torch.int64))
        for name, array in tensors.items()
        for kind in array.dtype.kind
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
