"""Tiny GGUF files, written as llama.cpp's converter does."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import numpy.typing as npt
import pytest
import torch
from gguf import GGMLQuantizationType, GGUFWriter
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from unispec.errors import InputError

__all__ = [
    "HIDDEN",
    "byte_characters",
    "gguf_name",
    "interleaved",
    "refused",
    "rope_divisors",
    "tiny_llama",
    "write_gguf",
]

FloatTensor = npt.NDArray[np.float32]


def byte_characters() -> list[str]:
    """GPT-2's character for each byte: itself if printable, else the next from U+0100."""
    printable = {*range(33, 127), *range(161, 173), *range(174, 256)}
    others = iter(range(256, 512))
    return [chr(byte) if byte in printable else chr(next(others)) for byte in range(256)]


HIDDEN, HEADS, KEY_HEADS, HEAD_DIM = 64, 4, 2, 32
GGUF_NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def tiny_llama(**overrides: Any) -> LlamaForCausalLM:
    """A random Llama whose heads are wider than H / heads, with grouped queries."""
    torch.manual_seed(0)
    fields: dict[str, Any] = {
        "hidden_size": HIDDEN,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KEY_HEADS,
        "head_dim": HEAD_DIM,
        "vocab_size": 262,
        "max_position_embeddings": 512,
        "rms_norm_eps": 2.0**-16,
        "rope_parameters": {"rope_type": "default", "rope_theta": 20000.0},
        "bos_token_id": 256,
        "eos_token_id": 257,
        "pad_token_id": None,
    }
    model = LlamaForCausalLM(LlamaConfig(**(fields | overrides)))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter)
    return model


def gguf_name(name: str) -> str:
    module, kind = name.rsplit(".", 1)
    if layer := re.fullmatch(r"model\.layers\.(\d+)\.(.+)", module):
        return f"blk.{layer[1]}.{GGUF_NAMES[layer[2]]}.{kind}"
    return f"{GGUF_NAMES[module]}.{kind}"


def interleaved(tensor: FloatTensor) -> FloatTensor:
    """llama.cpp's rows of q_proj and k_proj: j and j + D/2 of a head side by side."""
    result = np.empty_like(tensor)
    for start in range(0, len(tensor), HEAD_DIM):
        for j in range(HEAD_DIM // 2):
            result[start + 2 * j] = tensor[start + j]
            result[start + 2 * j + 1] = tensor[start + j + HEAD_DIM // 2]
    return result


def tokens_and_types() -> tuple[list[str], list[int]]:
    tokens = [*byte_characters(), "<bos>", "<eos>", "<tool>", "Ġt", "Ġth", "Ġthe"]
    return tokens, [1] * 256 + [3, 3, 4] + [1] * 3


def write_gguf(
    path: Path,
    model: LlamaForCausalLM | None = None,
    *,
    kind: GGMLQuantizationType = GGMLQuantizationType.F32,
    kinds: Callable[[str], GGMLQuantizationType] | None = None,
    to_bytes: Callable[[FloatTensor, GGMLQuantizationType], npt.NDArray[Any]] = gguf.quantize,
    architecture: str = "llama",
    tokenizer_model: str = "gpt2",
    pre: str = "smollm",
    metadata: dict[str, Any] | None = None,
    tensors: dict[str, FloatTensor] | None = None,
    max_tensors: int = 0,
) -> Path:
    """Write a model as llama.cpp's converter does; None in `metadata` leaves a key out.

    The matrices are of `kind`, or of that of their name in `kinds`; `to_bytes` makes it of their
    numbers.
    With `max_tensors` the file is split into parts of so many, and the first one is returned.
    """
    model = model or tiny_llama()
    config = model.config
    tokens, types = tokens_and_types()
    values = {
        "llama.block_count": config.num_hidden_layers,
        "llama.context_length": config.max_position_embeddings,
        "llama.embedding_length": config.hidden_size,
        "llama.feed_forward_length": config.intermediate_size,
        "llama.attention.head_count": config.num_attention_heads,
        "llama.attention.head_count_kv": config.num_key_value_heads,
        "llama.attention.key_length": config.head_dim,
        "llama.attention.value_length": config.head_dim,
        "llama.attention.layer_norm_rms_epsilon": config.rms_norm_eps,
        "llama.rope.dimension_count": config.head_dim,
        "llama.rope.freq_base": float(config.rope_parameters["rope_theta"]),
        "tokenizer.ggml.model": tokenizer_model,
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": types,
        "tokenizer.ggml.merges": ["Ġ t", "Ġt h", "Ġth e"],
        "tokenizer.ggml.bos_token_id": 256,
        "tokenizer.ggml.eos_token_id": 257,
    } | (metadata or {})
    writer = GGUFWriter(path, architecture, split_max_tensors=max_tensors)
    for key, value in values.items():
        if value is None:
            continue
        if isinstance(value, bool):
            writer.add_bool(key, value)
        elif isinstance(value, int):
            writer.add_uint32(key, value)
        elif isinstance(value, float):
            writer.add_float32(key, value)
        elif isinstance(value, str):
            writer.add_string(key, value)
        else:
            writer.add_array(key, value)
    for name, parameter in model.named_parameters():
        tensor = parameter.detach().numpy()
        if "q_proj" in name or "k_proj" in name:
            tensor = interleaved(tensor)
        is_matrix = tensor.ndim == 2
        of_matrix = kind if kinds is None else kinds(name)
        stored = of_matrix if is_matrix else GGMLQuantizationType.F32
        data = to_bytes(tensor, stored) if is_matrix else tensor
        writer.add_tensor(gguf_name(name), data, raw_dtype=stored)
    for name, tensor in (tensors or {}).items():
        writer.add_tensor(name, tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return min(path.parent.glob(f"{path.stem}-*.gguf")) if max_tensors else path


def refused(*parts: str) -> Any:
    """Expect an InputError of one line that has these parts, in any order."""
    pattern = "".join(f"(?=.*{re.escape(part)})" for part in parts)
    return pytest.raises(InputError, match=f"^{pattern}.*$")


def rope_divisors(factor: float, *, theta: float, original: int = 8192) -> FloatTensor:
    """What transformers' Llama 3 scaling divides each frequency by."""
    rope = {
        "rope_type": "llama3",
        "rope_theta": theta,
        "factor": factor,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": original,
    }
    config = LlamaConfig(
        hidden_size=HIDDEN, num_attention_heads=HEADS, head_dim=HEAD_DIM, rope_parameters=rope
    )
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    plain = theta ** (-np.arange(0, HEAD_DIM, 2) / HEAD_DIM)
    return np.asarray(plain / scaled.numpy(), dtype=np.float32)
