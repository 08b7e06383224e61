"""Tiny Llama targets, and those that differ from Llama a little."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from .checkpoint import Array, decoder_layer, norm, read, write
from .tokenizer import write_tokenizer

__all__ = ["agreeing_llama", "tiny_llama"]

ROPE_SCALING: dict[str, dict[str, Any] | None] = {
    "default": None,
    "linear": {"rope_type": "linear", "factor": 2.0},
    # Wavelengths of 6 to 60,000 positions lie on both sides of the bounds 64 / 4 and 64 / 1.
    "llama3": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    },
}

STATED: dict[str, dict[str, Any]] = {
    "llama": {"architectures": ["LlamaForCausalLM"]},
    "qwen2": {
        "architectures": ["Qwen2ForCausalLM"],
        "max_window_layers": 1,
        "rms_norm_eps": 1e-6,
        # It is stated, but switched off.
        "sliding_window": 64,
        "use_sliding_window": False,
    },
    "qwen3": {
        "architectures": ["Qwen3ForCausalLM"],
        "max_window_layers": 2,
        "rms_norm_eps": 1e-6,
        "sliding_window": None,
        "use_sliding_window": False,
    },
    "mistral": {"architectures": ["MistralForCausalLM"], "sliding_window": None},
    "granite": {
        "architectures": ["GraniteForCausalLM"],
        "attention_multiplier": 0.4,
        "embedding_multiplier": 0.1,
        "logits_scaling": 8.0,
        "residual_multiplier": 0.6,
    },
}
"""What config.json says of each model type, beside Llama's fields or instead of them."""

LEFT_OUT: dict[str, tuple[str, ...]] = {
    "llama": (),
    "qwen2": ("head_dim", "attention_bias", "mlp_bias", "rope_scaling"),
    "qwen3": ("mlp_bias",),
    "mistral": ("head_dim", "attention_bias", "mlp_bias", "rope_scaling"),
    "granite": ("head_dim",),
}
"""Llama's fields that a published config.json of each model type does not have."""

LOGIT_STD = 4.0
"""Standard deviation of the logits: near-ties are rare and the top token is no certainty."""

BRANCH_SCALE = 0.3
"""How strongly the layers of an agreeing target disturb its fixed successor."""


def tiny_llama(
    folder: Path,
    *,
    hidden_size: int,
    intermediate_size: int,
    layers: int,
    heads: int,
    kv_heads: int,
    head_dim: int,
    vocab_size: int,
    tie: bool,
    attention_bias: bool = False,
    rope: str = "default",
    dtype: str = "float32",
    seed: int = 0,
    max_position_embeddings: int = 512,
    model_type: str = "llama",
) -> Path:
    """Writes a random Llama, or a relative of it, with tokenizer to ``folder`` and returns it.

    Args:
        folder: Created if it does not exist.
        hidden_size: Width of the residual stream.
        intermediate_size: Width of the MLP.
        layers: Number of decoder layers.
        heads: Number of query heads.
        kv_heads: Number of key and value heads.
        head_dim: Width of a head; need not be ``hidden_size / heads``.
        vocab_size: Number of tokens, 248 to 935; 0 is unknown, 1 begins, 2 ends a text.
        tie: Whether the head is the embedding.
        attention_bias: Whether the four attention projections have a bias.
        rope: A key of ``ROPE_SCALING``.
        dtype: Type of the stored weights: float32, float16 or bfloat16.
        seed: Equal seeds and shapes give equal weights.
        max_position_embeddings: Context length.
        model_type: A key of ``STATED``; all but Llama and Qwen3 have heads of hidden_size / heads.
    """
    rng = np.random.default_rng(seed)
    config: dict[str, Any] = {
        "model_type": model_type,
        "hidden_size": hidden_size,
        "intermediate_size": intermediate_size,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim,
        "vocab_size": vocab_size,
        "max_position_embeddings": max_position_embeddings,
        "tie_word_embeddings": tie,
        "attention_bias": attention_bias,
        "mlp_bias": False,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "rope_scaling": ROPE_SCALING[rope],
        "bos_token_id": 1,
        "eos_token_id": 2,
        "dtype": dtype,
        **STATED[model_type],
    }
    for name in LEFT_OUT[model_type]:
        del config[name]
    head_std = LOGIT_STD * hidden_size**-0.5 * config.get("logits_scaling", 1)
    model: dict[str, Array] = {
        "embed_tokens.weight": rng.normal(0, head_std, (vocab_size, hidden_size)),
        # Random signs: a tied head would otherwise favour the token that was just read.
        "norm.weight": norm(rng, hidden_size) * rng.choice([-1, 1], hidden_size),
    }
    for index in range(layers):
        model |= decoder_layer(rng, config, index)
    tensors = {f"model.{name}": tensor for name, tensor in model.items()}
    if not tie:
        tensors["lm_head.weight"] = rng.normal(0, head_std, (vocab_size, hidden_size))
    write(folder, config, tensors)
    write_tokenizer(folder, vocab_size)
    return folder


def agreeing_llama(
    folder: Path,
    *,
    model_type: str = "llama",
    head_dim: int = 16,
    layers: int = 2,
    seed: int = 0,
    hidden_size: int = 64,
    heads: int = 4,
    vocab_size: int = 256,
    dtype: str = "float32",
) -> Path:
    """Writes a model whose next token is mostly a fixed function of the current one.

    The head's row for ``successor[t]`` points along the embedding of ``t``, and
    ``successor`` is one cycle through the vocabulary, so that greedy text does not settle
    on a short loop. The layers' contributions are strong enough to overrule the head now
    and then. ``agreeing_eagle`` writes a draft that knows the head but not the layers.
    """
    tiny_llama(
        folder,
        hidden_size=hidden_size,
        intermediate_size=2 * hidden_size,
        layers=layers,
        heads=heads,
        kv_heads=2,
        head_dim=head_dim,
        vocab_size=vocab_size,
        tie=False,
        dtype=dtype,
        seed=seed,
        model_type=model_type,
    )
    config, tensors = read(folder)
    rng = np.random.default_rng(seed + 1)
    embedding = tensors["model.embed_tokens.weight"]  # [V, H]
    cycle = rng.permutation(len(embedding))
    predecessor = np.empty_like(cycle)
    predecessor[np.roll(cycle, -1)] = cycle
    tensors["lm_head.weight"] = embedding[predecessor] * tensors["model.norm.weight"]
    for name, tensor in tensors.items():
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            tensor *= BRANCH_SCALE * (2 / layers) ** 0.5
    return write(folder, config, tensors)
