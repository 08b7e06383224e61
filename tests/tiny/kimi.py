"""A tiny Kimi K2.5: a DeepSeek-V3 language model behind a vision tower, and a DFlash draft."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from .checkpoint import Array, linear, norm, read, write
from .deepseek import tiny_deepseek
from .dflash import tiny_dflash

__all__ = ["MEDIA_PAD", "PLACEHOLDER", "tiny_kimi", "tiny_kimi_draft"]

PLACEHOLDER = 250
"""The token in whose place an image stands."""

MEDIA_PAD = "<|media_pad|>"
"""Its text."""

CHAT_TEMPLATE = (
    "{% for message in messages %}user: "
    "{% if message.content is string %}{{ message.content }}{% else %}"
    "{% for part in message.content %}"
    "{% if part.type == 'image' %}[" + MEDIA_PAD + "]{% else %}{{ part.text }}{% endif %}"
    "{% endfor %}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %} bot:{% endif %}"
)
"""Content may be text, or parts of which some are images, as in Kimi K2.5's own."""

VISION: dict[str, Any] = {
    "patch_size": 14,
    "init_pos_emb_height": 6,
    "init_pos_emb_width": 5,
    "init_pos_emb_time": 4,
    "pos_emb_type": "divided_fixed",
    "vt_hidden_size": 32,
    "vt_intermediate_size": 48,
    "vt_num_hidden_layers": 2,
    "vt_num_attention_heads": 2,
    "merge_kernel_size": [2, 2],
    "merge_type": "sd2_tpool",
    "mm_projector_type": "patchmerger",
    "projector_hidden_act": "gelu",
    "projector_ln_eps": 1e-5,
    "video_attn_type": "spatial_temporal",
}


LANGUAGE: dict[str, Any] = {
    "q_lora_rank": 24,
    "n_routed_experts": 8,
    "n_group": 1,
    "topk_group": 1,
    "num_experts_per_tok": 2,
    "layers": 3,
    "first_k_dense_replace": 1,
    "rope": "yarn",
}


def tiny_kimi(folder: Path, *, seed: int = 0, **shape: Any) -> Path:
    """Writes a random Kimi K2.5 with tokenizer to ``folder`` and returns it.

    Args:
        folder: Created if it does not exist.
        seed: Equal seeds and shapes give equal weights.
        shape: What differs in the language model, as ``tiny_deepseek`` takes it.
    """
    tiny_deepseek(folder, seed=seed, **{**LANGUAGE, **shape})
    text, language = read(folder)
    layers, hidden = text["num_hidden_layers"], text["hidden_size"]
    # Kimi K2.5 has no multi-token prediction layer.
    tensors = {
        f"language_model.{name}": tensor
        for name, tensor in language.items()
        if not name.startswith(f"model.layers.{layers}.")
    }
    tensors |= _vision(np.random.default_rng(seed + 1), hidden)
    config = {
        "architectures": ["KimiK25ForConditionalGeneration"],
        "model_type": "kimi_k25",
        "text_config": text | {"model_type": "kimi_k2", "num_nextn_predict_layers": 0},
        "vision_config": VISION | {"text_hidden_size": hidden, "model_type": "kimi_k25_vision"},
        "media_placeholder_token_id": PLACEHOLDER,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "tie_word_embeddings": False,
        "dtype": "float32",
    }
    _name_placeholder(folder)
    return write(folder, config, tensors)


def tiny_kimi_draft(
    folder: Path, target: Path, scratch: Path, *, head_dim: int = 16, seed: int = 0
) -> Path:
    """Writes a random DFlash draft, rotated as YaRN does, for ``tiny_kimi``'s target.

    Args:
        folder: Created if it does not exist.
        target: The target's folder.
        scratch: Where the language model's configuration may lie as a checkpoint of its own.
        head_dim: Width of a head of the draft.
        seed: Equal seeds give equal weights.
    """
    text = json.loads((target / "config.json").read_text())["text_config"]
    kept = ("hidden_size", "intermediate_size", "vocab_size", "num_hidden_layers", "hidden_act")
    kept += ("max_position_embeddings", "rms_norm_eps", "dtype", "tie_word_embeddings")
    kept += ("num_attention_heads",)
    write(
        scratch,
        {name: text[name] for name in kept} | {"rope_theta": 10000.0, "rope_scaling": None},
        {},
    )
    tiny_dflash(
        folder,
        scratch,
        layers=2,
        heads=4,
        kv_heads=2,
        head_dim=head_dim,
        block_size=4,
        target_layer_ids=(0, 2),
        mask_token_id=255,
        is_causal=True,
        seed=seed,
    )
    config, tensors = read(folder)
    config["model_type"] = "qwen3"
    scales = {"mscale": 1.0, "mscale_all_dim": 1.0}
    config["rope_parameters"] = text["rope_parameters"] | scales
    return write(folder, config, tensors)


def _name_placeholder(folder: Path) -> None:
    """Gives the placeholder, a byte of no UTF-8 text until now, its text, and adds the template."""
    path = folder / "tokenizer.json"
    tokenizer = json.loads(path.read_text())
    vocabulary = tokenizer["model"]["vocab"]
    (byte,) = (token for token, index in vocabulary.items() if index == PLACEHOLDER)
    del vocabulary[byte]
    vocabulary[MEDIA_PAD] = PLACEHOLDER
    named = {"id": PLACEHOLDER, "content": MEDIA_PAD}
    tokenizer["added_tokens"].append(tokenizer["added_tokens"][0] | named)
    path.write_text(json.dumps(tokenizer))
    path = folder / "tokenizer_config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps(config | {"chat_template": CHAT_TEMPLATE}))


def _vision(rng: np.random.Generator, text_hidden: int) -> dict[str, Array]:
    size, inner, patch = VISION["vt_hidden_size"], VISION["vt_intermediate_size"], 14
    joined = 4 * size

    def affine(name: str, rows: int, columns: int) -> dict[str, Array]:
        return {
            f"{name}.weight": linear(rng, rows, columns),
            f"{name}.bias": rng.normal(0, 0.2, rows),
        }

    def layer_norm(name: str) -> dict[str, Array]:
        return {f"{name}.weight": norm(rng, size), f"{name}.bias": rng.normal(0, 0.2, size)}

    tower = "vision_tower"
    tensors = affine(f"{tower}.patch_embed.proj", size, 3 * patch * patch)
    weight = f"{tower}.patch_embed.proj.weight"
    tensors[weight] = tensors[weight].reshape(size, 3, patch, patch)
    tensors[f"{tower}.patch_embed.pos_emb.weight"] = rng.normal(0, 1, (6, 5, size))
    for block in range(VISION["vt_num_hidden_layers"]):
        prefix = f"{tower}.encoder.blocks.{block}"
        tensors |= layer_norm(f"{prefix}.norm0") | layer_norm(f"{prefix}.norm1")
        tensors |= affine(f"{prefix}.wqkv", 3 * size, size) | affine(f"{prefix}.wo", size, size)
        tensors |= affine(f"{prefix}.mlp.fc0", inner, size)
        tensors |= affine(f"{prefix}.mlp.fc1", size, inner)
    tensors |= layer_norm(f"{tower}.encoder.final_layernorm") | layer_norm("mm_projector.pre_norm")
    tensors |= affine("mm_projector.proj.0", joined, joined)
    return tensors | affine("mm_projector.proj.2", text_hidden, joined)
