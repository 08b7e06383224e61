"""Tiny DeepSeek-V3 targets with a multi-token prediction layer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from .checkpoint import Array, linear, norm, read, write
from .llama import LOGIT_STD
from .tokenizer import write_tokenizer

__all__ = ["agreeing_deepseek", "in_fp8_blocks", "tiny_deepseek"]

ROPE: dict[str, dict[str, Any]] = {
    "default": {"rope_type": "default", "rope_theta": 10000.0},
    "yarn": {
        "rope_type": "yarn",
        "rope_theta": 10000.0,
        "factor": 8.0,
        "original_max_position_embeddings": 64,
        "beta_fast": 32,
        "beta_slow": 1,
        "mscale": 0.7,
        "mscale_all_dim": 1.0,
    },
}
"""Unequal mscales, so that the table and the softmax scale are both put to the test."""

FEATURE_SCALE = 1.7
"""Weight of the feature in an agreeing layer: a wrong one changes many proposals."""

BRANCH_SCALE = 0.25
"""How strongly the layers of an agreeing target disturb its fixed successor."""


def tiny_deepseek(
    folder: Path,
    *,
    q_lora_rank: int | None,
    n_routed_experts: int,
    n_group: int,
    topk_group: int,
    num_experts_per_tok: int,
    layers: int,
    first_k_dense_replace: int,
    n_shared_experts: int = 1,
    rope: str = "default",
    rope_interleave: bool = True,
    norm_topk_prob: bool = True,
    hidden_size: int = 64,
    moe_intermediate_size: int = 32,
    heads: int = 4,
    kv_lora_rank: int = 32,
    qk_nope_head_dim: int = 16,
    qk_rope_head_dim: int = 8,
    v_head_dim: int = 24,
    vocab_size: int = 256,
    seed: int = 0,
) -> Path:
    """Writes a random DeepSeek-V3 with tokenizer and one MTP layer, and returns the folder.

    Args:
        folder: Created if it does not exist.
        q_lora_rank: Width of the queries' latent, if they have one.
        n_routed_experts: Experts of a layer.
        n_group: Groups of experts.
        topk_group: Groups a token chooses.
        num_experts_per_tok: Experts a token chooses.
        layers: Number of decoder layers, the MTP layer not counted.
        first_k_dense_replace: Layers without experts.
        n_shared_experts: Experts that every token goes through.
        rope: A key of ``ROPE``.
        rope_interleave: Whether the columns that rotate together are neighbours.
        norm_topk_prob: Whether the chosen experts' weights are normalised.
        hidden_size: Width of the residual stream.
        moe_intermediate_size: Width inside an expert.
        heads: Number of heads.
        kv_lora_rank: Width of the latent of keys and values.
        qk_nope_head_dim: Width of the part of a query head that is not rotated.
        qk_rope_head_dim: Width of the part that is rotated.
        v_head_dim: Width of a value head.
        vocab_size: Number of tokens, 248 to 935.
        seed: Equal seeds and shapes give equal weights.
    """
    rng = np.random.default_rng(seed)
    config: dict[str, Any] = {
        "architectures": ["DeepseekV3ForCausalLM"],
        "model_type": "deepseek_v3",
        "hidden_size": hidden_size,
        "intermediate_size": 2 * hidden_size,
        "moe_intermediate_size": moe_intermediate_size,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": heads,
        "n_routed_experts": n_routed_experts,
        "n_shared_experts": n_shared_experts,
        "n_group": n_group,
        "topk_group": topk_group,
        "num_experts_per_tok": num_experts_per_tok,
        "first_k_dense_replace": first_k_dense_replace,
        "norm_topk_prob": norm_topk_prob,
        "routed_scaling_factor": 1.5,
        "scoring_func": "sigmoid",
        "topk_method": "noaux_tc",
        "q_lora_rank": q_lora_rank,
        "kv_lora_rank": kv_lora_rank,
        "qk_nope_head_dim": qk_nope_head_dim,
        "qk_rope_head_dim": qk_rope_head_dim,
        "v_head_dim": v_head_dim,
        "vocab_size": vocab_size,
        "max_position_embeddings": 512,
        "rope_parameters": ROPE[rope],
        "rope_interleave": rope_interleave,
        "num_nextn_predict_layers": 1,
        "tie_word_embeddings": False,
        "attention_bias": False,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-6,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "dtype": "float32",
    }
    head_std = LOGIT_STD * hidden_size**-0.5
    tensors: dict[str, Array] = {
        "model.embed_tokens.weight": rng.normal(0, head_std, (vocab_size, hidden_size)),
        "model.norm.weight": norm(rng, hidden_size) * rng.choice([-1, 1], hidden_size),
        "lm_head.weight": rng.normal(0, head_std, (vocab_size, hidden_size)),
    }
    for index in range(layers + 1):
        tensors |= _layer(rng, config, index)
    prefix = f"model.layers.{layers}"
    tensors |= {
        f"{prefix}.enorm.weight": norm(rng, hidden_size),
        f"{prefix}.hnorm.weight": norm(rng, hidden_size),
        f"{prefix}.eh_proj.weight": linear(rng, hidden_size, 2 * hidden_size),
        f"{prefix}.shared_head.norm.weight": norm(rng, hidden_size),
        f"{prefix}.shared_head.head.weight": tensors["lm_head.weight"],
        f"{prefix}.embed_tokens.weight": tensors["model.embed_tokens.weight"],
    }
    write(folder, config, tensors)
    write_tokenizer(folder, vocab_size, beyond=("<think>", "</think>"))
    return folder


def agreeing_deepseek(
    folder: Path,
    *,
    block: tuple[int, int] = (48, 32),
    layers: int = 3,
    branch_scale: float = BRANCH_SCALE,
    seed: int = 0,
    **shape: Any,
) -> Path:
    """Writes a target whose next token is mostly fixed by the current one, in FP8 blocks.

    As ``agreeing_llama``; its MTP layer hands on the embedding, from which the head finds the
    embedded token's successor.

    Args:
        folder: Created if it does not exist.
        block: Rows and columns that share a scale.
        layers: Number of decoder layers, the MTP layer not counted.
        branch_scale: How strongly its layers disturb the fixed successor.
        seed: Equal seeds and shapes give equal weights.
        **shape: What ``tiny_deepseek`` takes, where it is to differ.
    """
    usual: dict[str, Any] = {
        "q_lora_rank": None,
        "n_routed_experts": 16,
        "n_group": 4,
        "topk_group": 2,
        "num_experts_per_tok": 4,
        "first_k_dense_replace": 1,
        "rope": "yarn",
    }
    tiny_deepseek(folder, **(usual | shape), layers=layers, seed=seed)
    config, tensors = read(folder)
    rng = np.random.default_rng(seed + 1)
    embedding = tensors["model.embed_tokens.weight"]  # [V, H]
    cycle = rng.permutation(len(embedding))
    predecessor = np.empty_like(cycle)
    predecessor[np.roll(cycle, -1)] = cycle
    prefix = f"model.layers.{layers}"
    tensors["lm_head.weight"] = embedding[predecessor] * tensors["model.norm.weight"]
    tensors[f"{prefix}.shared_head.head.weight"] = tensors["lm_head.weight"]
    tensors[f"{prefix}.shared_head.norm.weight"] = tensors["model.norm.weight"]
    embedding_half, feature_half = np.split(tensors[f"{prefix}.eh_proj.weight"], 2, axis=1)
    embedding_half[:] = np.eye(len(embedding_half))
    feature_half *= FEATURE_SCALE
    for name, tensor in tensors.items():
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            tensor *= branch_scale
    write(folder, config, tensors)
    return in_fp8_blocks(folder, block)


def in_fp8_blocks(folder: Path, block: tuple[int, int]) -> Path:
    """Rewrites the projections of a checkpoint in float8 e4m3 with a scale for each block.

    The block need not divide a matrix. Head, embeddings, norms, router and ``eh_proj`` stay.
    """
    path = folder / "model.safetensors"
    stored: dict[str, torch.Tensor] = {}
    for name, tensor in load_file(path).items():
        kept = ("embed_tokens", "head", "norm", ".gate.", "eh_proj")
        if tensor.ndim != 2 or any(part in name for part in kept):
            stored[name] = tensor.clone()
            continue
        rows, columns = (-(-size // width) for size, width in zip(tensor.shape, block, strict=True))
        scale = torch.empty(rows, columns)
        values = torch.empty_like(tensor, dtype=torch.float8_e4m3fn)
        for row in range(rows):
            for column in range(columns):
                here = (
                    slice(row * block[0], (row + 1) * block[0]),
                    slice(column * block[1], (column + 1) * block[1]),
                )
                scale[row, column] = tensor[here].abs().max() / 448
                values[here] = (tensor[here] / scale[row, column]).to(torch.float8_e4m3fn)
        stored[name] = values
        stored[name + "_scale_inv"] = scale
    save_file(stored, path, metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {
        "quant_method": "fp8",
        "fmt": "e4m3",
        "activation_scheme": "dynamic",
        "weight_block_size": list(block),
    }
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    return folder


def _layer(rng: np.random.Generator, config: dict[str, Any], index: int) -> dict[str, Array]:
    hidden, heads = config["hidden_size"], config["num_attention_heads"]
    query = heads * (config["qk_nope_head_dim"] + config["qk_rope_head_dim"])
    rank, q_rank = config["kv_lora_rank"], config["q_lora_rank"]
    values = config["qk_nope_head_dim"] + config["v_head_dim"]
    attention = {
        "kv_a_proj_with_mqa": linear(rng, rank + config["qk_rope_head_dim"], hidden),
        "kv_a_layernorm": norm(rng, rank),
        "kv_b_proj": linear(rng, heads * values, rank),
        "o_proj": linear(rng, hidden, heads * config["v_head_dim"]),
    }
    if q_rank is None:
        attention["q_proj"] = linear(rng, query, hidden)
    else:
        attention["q_a_proj"] = linear(rng, q_rank, hidden)
        attention["q_a_layernorm"] = norm(rng, q_rank)
        attention["q_b_proj"] = linear(rng, query, q_rank)
    tensors = {f"self_attn.{name}.weight": tensor for name, tensor in attention.items()}
    tensors["input_layernorm.weight"] = norm(rng, hidden)
    tensors["post_attention_layernorm.weight"] = norm(rng, hidden)

    def mlp(prefix: str, inner: int) -> dict[str, Array]:
        return {
            f"{prefix}.gate_proj.weight": linear(rng, inner, hidden),
            f"{prefix}.up_proj.weight": linear(rng, inner, hidden),
            f"{prefix}.down_proj.weight": linear(rng, hidden, inner),
        }

    if index < config["first_k_dense_replace"]:
        tensors |= mlp("mlp", config["intermediate_size"])
    else:
        experts, inner = config["n_routed_experts"], config["moe_intermediate_size"]
        tensors["mlp.gate.weight"] = linear(rng, experts, hidden)
        # Strong enough to change choices, and negative for some experts.
        tensors["mlp.gate.e_score_correction_bias"] = rng.normal(0, 0.3, experts)
        for expert in range(experts):
            tensors |= mlp(f"mlp.experts.{expert}", inner)
        tensors |= mlp("mlp.shared_experts", inner * config["n_shared_experts"])
    return {f"model.layers.{index}.{name}": tensor for name, tensor in tensors.items()}
