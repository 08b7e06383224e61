"""The metadata of a Llama GGUF file as Hugging Face's configuration."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from unispec.checkpoints.gguf_metadata import Metadata
from unispec.errors import InputError

__all__ = ["llama_config"]

# Llama 3.1 and 3.2: the same for every published size, only `factor` differs.
_LLAMA3_LOW_FREQ_FACTOR: Final = 1.0
_LLAMA3_HIGH_FREQ_FACTOR: Final = 4.0
_LLAMA3_ORIGINAL_MAX_POSITION: Final = 8192


def llama_config(
    metadata: Metadata,
    shapes: Mapping[str, tuple[int, ...]],
    *,
    rope_divisors: npt.NDArray[np.float32] | None,
) -> dict[str, Any]:
    """What `config.json` of the same model holds (`LlamaConfig`).

    Args:
        metadata: the file's metadata; keys of the GGUF specification.
        shapes: shapes of the file's tensors, under llama.cpp's names.
        rope_divisors: the tensor `rope_freqs.weight`, float32 `[head_dim / 2]`, if there is one.

    Raises:
        InputError: a key is missing, or a value asks for what Hugging Face's
            Llama does not have.
    """
    hidden = metadata.integer("llama.embedding_length")
    heads = metadata.integer("llama.attention.head_count")
    key_heads = metadata.integer("llama.attention.head_count_kv", default=heads)
    if heads < 1 or key_heads < 1 or heads % key_heads:
        raise InputError(
            f"{metadata.path} has {heads} query heads and {key_heads} key heads, expected a"
            " multiple of at least one key head: download the file again"
        )
    head_dim = metadata.integer("llama.attention.key_length", default=hidden // heads)
    for key, needed, meaning in (
        ("llama.attention.value_length", head_dim, "values as wide as keys"),
        ("llama.rope.dimension_count", head_dim, "rope over the whole head"),
        ("llama.expert_count", 0, "a dense MLP"),
    ):
        if (found := metadata.integer(key, default=needed)) != needed:
            raise InputError(
                f"{metadata.path}: {key} is {found} and {needed} is supported: use a model with"
                f" {meaning}"
            )
    if "token_embd.weight" not in shapes:
        raise InputError(f"{metadata.path} has no tensor 'token_embd.weight': download it again")
    if (layers := metadata.integer("llama.block_count")) > len(shapes):
        raise InputError(
            f"{metadata.path}: llama.block_count is {layers} and the file has {len(shapes)}"
            " tensors, fewer than layers: download it again"
        )
    rope_theta = metadata.number("llama.rope.freq_base", default=10000.0)
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "attention_bias": "blk.0.attn_q.bias" in shapes,
        "bos_token_id": metadata.optional_integer("tokenizer.ggml.bos_token_id"),
        "dtype": "float32",
        "eos_token_id": _eos_token_id(metadata),
        "head_dim": head_dim,
        "hidden_act": "silu",
        "hidden_size": hidden,
        "intermediate_size": metadata.integer("llama.feed_forward_length"),
        "max_position_embeddings": metadata.integer("llama.context_length"),
        "mlp_bias": False,
        "num_attention_heads": heads,
        "num_hidden_layers": layers,
        "num_key_value_heads": key_heads,
        "pad_token_id": metadata.optional_integer("tokenizer.ggml.padding_token_id"),
        "rms_norm_eps": metadata.number("llama.attention.layer_norm_rms_epsilon"),
        "rope_parameters": {
            "rope_theta": rope_theta,
            **_rope_scaling(metadata, rope_divisors, rope_theta, head_dim),
        },
        "rope_theta": rope_theta,
        "tie_word_embeddings": "output.weight" not in shapes,
        "vocab_size": shapes["token_embd.weight"][0],
    }


def _eos_token_id(metadata: Metadata) -> int | list[int] | None:
    """The ids that end an answer: the end of the text, and of a turn where it differs."""
    eos = metadata.optional_integer("tokenizer.ggml.eos_token_id")
    eot = metadata.optional_integer("tokenizer.ggml.eot_token_id")
    if eos is None or eot is None or eos == eot:
        return eot if eos is None else eos
    return [eos, eot]


def _rope_scaling(
    metadata: Metadata, divisors: npt.NDArray[np.float32] | None, theta: float, head_dim: int
) -> dict[str, Any]:
    """Hugging Face's rope type and its parameters."""
    kind = metadata.optional_text("llama.rope.scaling.type") or "none"
    if divisors is not None:
        if kind != "none":
            raise InputError(
                f"{metadata.path} has both the tensor 'rope_freqs.weight' and"
                f" llama.rope.scaling.type {kind!r}: use a file with one of them"
            )
        return _llama3_scaling(divisors, theta, head_dim, metadata.path)
    if kind == "none":
        return {"rope_type": "default"}
    if kind == "linear":
        return {"rope_type": "linear", "factor": metadata.number("llama.rope.scaling.factor")}
    raise InputError(
        f"{metadata.path} has llama.rope.scaling.type {kind!r}: use a model with rope of type"
        " 'none', 'linear' or Llama 3's"
    )


def _llama3_scaling(
    divisors: npt.NDArray[np.float32], theta: float, head_dim: int, path: Path
) -> dict[str, Any]:
    """The parameters behind llama.cpp's table of rope frequency divisors [D/2].

    llama.cpp stores what Llama 3's scaling divides each frequency by: `factor` for
    the wavelengths beyond the original context, 1 for the short ones, and a value
    between them in the middle. The table is accepted only if the parameters give
    the same one back.
    """
    factor = float(divisors.max())
    frequencies = theta ** (-np.arange(0, head_dim, 2) / head_dim)  # [D/2]
    turns = _LLAMA3_ORIGINAL_MAX_POSITION * frequencies / (2 * np.pi)
    unscaled = np.clip(
        (turns - _LLAMA3_LOW_FREQ_FACTOR) / (_LLAMA3_HIGH_FREQ_FACTOR - _LLAMA3_LOW_FREQ_FACTOR),
        0.0,
        1.0,
    )
    expected = 1.0 / ((1.0 - unscaled) / factor + unscaled)
    if divisors.shape != expected.shape or not np.allclose(divisors, expected, rtol=1e-4):
        raise InputError(
            f"{path}: the tensor 'rope_freqs.weight' is not Llama 3's rope scaling of an original"
            f" context of {_LLAMA3_ORIGINAL_MAX_POSITION}: use a checkpoint in safetensors"
        )
    return {
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": _LLAMA3_LOW_FREQ_FACTOR,
        "high_freq_factor": _LLAMA3_HIGH_FREQ_FACTOR,
        "original_max_position_embeddings": _LLAMA3_ORIGINAL_MAX_POSITION,
    }
