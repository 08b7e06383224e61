"""Write a tiny random DeepSeek-V3 checkpoint with a multi-token prediction layer.

    python examples/tiny_deepseek.py FOLDER
    unispec generate --model FOLDER --speculative-method mtp --num-speculative-tokens 2 \\
        --prompt "Hello" --max-new-tokens 32 --temperature 0

Its text is noise; what it shows is the format, and that target and MTP layer run as one graph.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
import numpy.typing as npt
from safetensors.numpy import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

Array = npt.NDArray[np.float32]

LAYERS, HEADS, EXPERTS = 3, 4, 8
HIDDEN, DENSE, EXPERT = 64, 128, 32
QUERY_RANK, RANK, NOPE, ROPE, VALUE = 24, 32, 16, 8, 16

CONFIG = {
    "architectures": ["DeepseekV3ForCausalLM"],
    "model_type": "deepseek_v3",
    "hidden_size": HIDDEN,
    "intermediate_size": DENSE,
    "moe_intermediate_size": EXPERT,
    "num_hidden_layers": LAYERS,
    "num_nextn_predict_layers": 1,
    "num_attention_heads": HEADS,
    "num_key_value_heads": HEADS,
    "q_lora_rank": QUERY_RANK,
    "kv_lora_rank": RANK,
    "qk_nope_head_dim": NOPE,
    "qk_rope_head_dim": ROPE,
    "v_head_dim": VALUE,
    "n_routed_experts": EXPERTS,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "n_group": 2,
    "topk_group": 1,
    "norm_topk_prob": True,
    "routed_scaling_factor": 2.5,
    "scoring_func": "sigmoid",
    "topk_method": "noaux_tc",
    "first_k_dense_replace": 1,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "max_position_embeddings": 512,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    "tie_word_embeddings": False,
    "attention_bias": False,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "dtype": "float32",
}


def main() -> None:
    """Writes config.json, model.safetensors and a byte-level tokenizer."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("folder", type=Path, help="created if it does not exist")
    folder: Path = parser.parse_args().folder
    folder.mkdir(parents=True, exist_ok=True)

    special = ["<s>", "</s>"]
    vocabulary = [*special, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    ids = {token: index for index, token in enumerate(vocabulary)}
    tokenizer = Tokenizer(models.BPE(vocab=ids, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(special)
    tokenizer.save(str(folder / "tokenizer.json"))
    names = {"bos_token": special[0], "eos_token": special[1]}
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", **names})
    )

    config = CONFIG | {"vocab_size": len(vocabulary)}
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    save_file(tensors(len(vocabulary)), folder / "model.safetensors", metadata={"format": "pt"})


def tensors(vocab_size: int) -> dict[str, Array]:
    """Every tensor of the checkpoint by name."""
    rng = np.random.default_rng(0)

    def matrix(rows: int, columns: int) -> Array:
        return rng.normal(0, 1.5 * columns**-0.5, (rows, columns)).astype(np.float32)

    def mlp(prefix: str, inner: int) -> dict[str, Array]:
        return {
            f"{prefix}.gate_proj.weight": matrix(inner, HIDDEN),
            f"{prefix}.up_proj.weight": matrix(inner, HIDDEN),
            f"{prefix}.down_proj.weight": matrix(HIDDEN, inner),
        }

    def layer(index: int) -> dict[str, Array]:
        prefix = f"model.layers.{index}"
        attention = {
            "q_a_proj": matrix(QUERY_RANK, HIDDEN),
            "q_a_layernorm": ones(QUERY_RANK),
            "q_b_proj": matrix(HEADS * (NOPE + ROPE), QUERY_RANK),
            "kv_a_proj_with_mqa": matrix(RANK + ROPE, HIDDEN),
            "kv_a_layernorm": ones(RANK),
            "kv_b_proj": matrix(HEADS * (NOPE + VALUE), RANK),
            "o_proj": matrix(HIDDEN, HEADS * VALUE),
        }
        found = {f"{prefix}.self_attn.{name}.weight": part for name, part in attention.items()}
        found[f"{prefix}.input_layernorm.weight"] = ones(HIDDEN)
        found[f"{prefix}.post_attention_layernorm.weight"] = ones(HIDDEN)
        if index == 0:
            return found | mlp(f"{prefix}.mlp", DENSE)
        found[f"{prefix}.mlp.gate.weight"] = matrix(EXPERTS, HIDDEN)
        found[f"{prefix}.mlp.gate.e_score_correction_bias"] = np.zeros(EXPERTS, np.float32)
        for expert in range(EXPERTS):
            found |= mlp(f"{prefix}.mlp.experts.{expert}", EXPERT)
        return found | mlp(f"{prefix}.mlp.shared_experts", EXPERT)

    found = {
        "model.embed_tokens.weight": matrix(vocab_size, HIDDEN),
        "model.norm.weight": ones(HIDDEN),
        "lm_head.weight": 3 * matrix(vocab_size, HIDDEN),
    }
    for index in range(LAYERS + 1):
        found |= layer(index)
    # The multi-token prediction layer has four tensors more than a decoder layer.
    prefix = f"model.layers.{LAYERS}"
    return found | {
        f"{prefix}.enorm.weight": ones(HIDDEN),
        f"{prefix}.hnorm.weight": ones(HIDDEN),
        f"{prefix}.eh_proj.weight": matrix(HIDDEN, 2 * HIDDEN),
        f"{prefix}.shared_head.norm.weight": ones(HIDDEN),
    }


def ones(size: int) -> Array:
    """A norm's weight."""
    return np.ones(size, np.float32)


if __name__ == "__main__":
    main()
