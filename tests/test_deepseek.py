"""DeepSeek-V3: logits of three shapes against transformers, and what a checkpoint may hold."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from logits_graph import LogitsGraph, Stack, assert_logits, compile_logits
from prompts import random_prompt
from reference.block_fp8 import dequantised_tensors
from reference.mtp import MtpReference
from reference.target import TargetReference
from runs import MAX_LENGTH
from safetensors.torch import load_file, save_file
from tiny import TinyPair, in_fp8_blocks, tiny_deepseek

from unispec.checkpoints import read_tensors
from unispec.checkpoints.block_fp8 import dequantise_blocks
from unispec.engine import EngineConfig
from unispec.engine.pipeline_config import make_pipeline_config
from unispec.errors import InputError
from unispec.pipelines.drafts.mtp.weights import mtp_state_dict
from unispec.pipelines.targets.deepseek.config import DeepseekV3Config
from unispec.pipelines.targets.deepseek.stack import DeepseekV3
from unispec.pipelines.targets.deepseek.weights import (
    dequantised,
    layer_shapes,
    target_state_dict,
)

PAIRS = ("deepseek_mtp_agreeing", "deepseek_mtp_sampled", "deepseek_mtp")


def read_stack(folder: Path) -> Stack:
    pipeline_config = make_pipeline_config(EngineConfig(model=str(folder), max_length=MAX_LENGTH))
    config = DeepseekV3Config.initialize(pipeline_config)
    tensors = dequantised(read_tensors([folder / "model.safetensors"]), config, source=str(folder))
    weights = target_state_dict(tensors, config, source=str(folder))
    return Stack(config, DeepseekV3(config), weights)


@pytest.fixture(scope="module")
def deepseek_model(tiny_pair: Callable[[str], TinyPair]) -> LogitsGraph:
    stacks = {name: read_stack(tiny_pair(name).target) for name in PAIRS}
    return compile_logits("deepseekV3_logits", stacks)


@pytest.mark.usefixtures("one_thread")
def test_logits_of_three_shapes(
    deepseek_model: LogitsGraph, tiny_target: Callable[[str], TargetReference]
) -> None:
    assert_logits(deepseek_model, {name: tiny_target(name) for name in PAIRS})


def test_choices_differ_from_plain_top_k(tiny_target: Callable[[str], TargetReference]) -> None:
    """The tiny routers' biases and groups decide something, else no test would see them."""
    target = tiny_target("deepseek_mtp_agreeing")
    gate = target.model.model.layers[1].mlp
    states: list[torch.Tensor] = []
    hook = gate.register_forward_pre_hook(lambda _, inputs: states.append(inputs[0]))
    target.features_and_logits(random_prompt(256, 60, seed=3))
    hook.remove()
    with torch.inference_mode():
        logits = gate.gate(states[0])
        chosen = gate.route_tokens_to_experts(logits)[0].sort(dim=-1).values
        k = gate.top_k
        plain = logits.topk(k, dim=-1).indices.sort(dim=-1).values
        biased = (logits.sigmoid() + gate.gate.e_score_correction_bias).topk(k, dim=-1)
    assert (chosen != plain).any(dim=-1).float().mean() > 0.3
    assert (chosen != biased.indices.sort(dim=-1).values).any(dim=-1).float().mean() > 0.2


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("name", PAIRS[:2])
def test_tiny_layers_see_a_wrong_feature(
    tiny_pair: Callable[[str], TinyPair], tiny_target: Callable[[str], TargetReference], name: str
) -> None:
    """Engine tests run them: a feature of another position, or none, must not go unseen."""
    target = tiny_target(name)
    layer = MtpReference(tiny_pair(name).target, target)
    prompt = random_prompt(256, 40, seed=9)
    features, _ = target.features_and_logits(prompt[:-1])

    def proposals(features: torch.Tensor) -> list[list[int]]:
        return [layer.propose(prompt[: end + 1], features[:end], 3) for end in range(4, 40, 2)]

    right = proposals(features)
    for wrong in (features.roll(1, dims=0), torch.zeros_like(features)):
        changed = np.mean([a != b for a, b in zip(right, proposals(wrong), strict=True)])
        assert changed >= 0.25


def test_fp8_blocks_are_read_as_they_were_written(tiny_pair: Callable[[str], TinyPair]) -> None:
    folder = tiny_pair("deepseek_mtp_agreeing").target
    assert any(name.endswith("_scale_inv") for name in load_file(folder / "model.safetensors"))
    tensors = read_tensors([folder / "model.safetensors"])
    ours = dequantised(tensors, initialize(folder), source="tiny")
    theirs = dequantised_tensors(folder)
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        np.testing.assert_array_equal(ours[name], tensor.numpy(), err_msg=name)


def test_every_byte_of_float8_has_its_value() -> None:
    """A matrix of all bytes; torch knows the format too."""
    codes = np.arange(256, dtype=np.uint8).reshape(16, 16)
    scale = np.ones((1, 1), np.float32)
    read = dequantise_blocks({"w": codes, "w_scale_inv": scale}, (16, 16), source="tiny")["w"]
    expected = torch.from_numpy(codes).view(torch.float8_e4m3fn).float().numpy()
    np.testing.assert_array_equal(read, expected)


SHAPE: dict[str, Any] = {
    "q_lora_rank": 24,
    "n_routed_experts": 8,
    "n_group": 2,
    "topk_group": 1,
    "num_experts_per_tok": 2,
    "layers": 2,
    "first_k_dense_replace": 1,
}


def initialize(folder: Path, method: str | None = None) -> Any:
    from unispec.pipelines.architectures.unified_mtp_deepseekV3 import UnifiedMTPDeepseekV3Config

    options: dict[str, Any] = {"speculative_method": method} if method else {}
    config = make_pipeline_config(EngineConfig(model=str(folder), max_length=64, **options))
    return (UnifiedMTPDeepseekV3Config if method else DeepseekV3Config).initialize(config)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"n_group": 3}, "n_routed_experts 8 .* n_group 3"),
        ({"topk_group": 5}, "topk_group 5"),
        ({"num_experts_per_tok": 5}, "num_experts_per_tok 5 .* 4 experts"),
        ({"scoring_func": "softmax"}, "scoring_func 'softmax'"),
        ({"topk_method": "greedy"}, "topk_method 'greedy'"),
        ({"moe_layer_freq": 2}, "moe_layer_freq 2"),
        ({"attention_bias": True}, "attention_bias True"),
        ({"qk_rope_head_dim": 7}, "qk_rope_head_dim 7"),
        ({"kv_lora_rank": 0}, "kv_lora_rank 0"),
        ({"routed_scaling_factor": -1.0}, "routed_scaling_factor -1.0"),
        ({"rope_parameters": {"rope_type": "linear", "factor": 2.0}}, "rope type 'linear'"),
        (
            {
                "rope_parameters": {
                    "rope_type": "yarn",
                    "factor": 4.0,
                    "original_max_position_embeddings": 64,
                    "mscale": 1.0,
                }
            },
            "mscale and mscale_all_dim",
        ),
    ],
)
def test_configurations_that_are_refused(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    folder = tiny_deepseek(tmp_path, **SHAPE)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))
    with pytest.raises(InputError, match=message):
        initialize(folder)


def test_a_checkpoint_that_says_it_has_no_mtp_layer(tmp_path: Path) -> None:
    folder = tiny_deepseek(tmp_path, **SHAPE)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"num_nextn_predict_layers": 0}))
    with pytest.raises(InputError, match="no multi-token prediction layer 2"):
        initialize(folder, "mtp")


@pytest.mark.parametrize(
    ("remove", "message"),
    [
        ("model.layers.2.", "no tensors of layer 2"),
        ("model.layers.2.eh_proj", "lacks tensor 'layers.2.eh_proj.weight'"),
        ("model.layers.2.mlp.experts.5.up_proj", r"layers\.2\.mlp\.experts\.5\.up_proj"),
    ],
)
def test_missing_mtp_weights_name_the_layer(tmp_path: Path, remove: str, message: str) -> None:
    folder = tiny_deepseek(tmp_path, **SHAPE)
    tensors = read_tensors([folder / "model.safetensors"])
    kept = {name: tensor for name, tensor in tensors.items() if not name.startswith(remove)}
    with pytest.raises(InputError, match=message):
        mtp_state_dict(kept, initialize(folder), source=str(folder))


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("model.layers.1.mlp.experts.3.down_proj.weight", None, "lacks tensor"),
        ("model.layers.0.self_attn.kv_b_proj.weight", (3, 4), r"has shape \[3, 4\]"),
        ("model.layers.1.mlp.gate.weight", float("nan"), "NaN"),
        ("model.layers.0.self_attn.q_proj.weight", (2, 2), "does not have"),
    ],
)
def test_targets_that_are_refused(tmp_path: Path, name: str, change: Any, message: str) -> None:
    folder = tiny_deepseek(tmp_path, **SHAPE)
    tensors = dict(read_tensors([folder / "model.safetensors"]))
    if change is None:
        del tensors[name]
    elif isinstance(change, tuple):
        tensors[name] = np.zeros(change, np.float32)
    else:
        tensors[name] = np.full_like(tensors[name], change)
    with pytest.raises(InputError, match=message):
        target_state_dict(tensors, initialize(folder), source=str(folder))


def test_scales_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    folder = in_fp8_blocks(tiny_deepseek(tmp_path, **SHAPE), (48, 32))
    tensors = dict(read_tensors([folder / "model.safetensors"]))
    config = initialize(folder)
    name = "model.layers.0.self_attn.o_proj.weight_scale_inv"
    wrong = tensors | {name: tensors[name][:, :1]}
    with pytest.raises(InputError, match=r"weight_scale_inv.*expected"):
        dequantised(wrong, config, source="tiny")
    del wrong[name]
    without = dequantised(wrong, config, source="tiny")
    with pytest.raises(InputError, match=r"o_proj.weight' has dtype uint8"):
        target_state_dict(without, config, source="tiny")
    orphan = {name: tensors[name]}
    with pytest.raises(InputError, match=r"weight_scale_inv' without"):
        dequantised(orphan, config, source="tiny")


# config.json of deepseek-ai/DeepSeek-V3 and text_config of moonshotai/Kimi-K2.5, as far as they
# are read.
DEEPSEEK_V3: dict[str, Any] = {
    "architectures": ["DeepseekV3ForCausalLM"],
    "model_type": "deepseek_v3",
    "hidden_size": 7168,
    "intermediate_size": 18432,
    "moe_intermediate_size": 2048,
    "num_hidden_layers": 61,
    "num_attention_heads": 128,
    "num_key_value_heads": 128,
    "n_routed_experts": 256,
    "n_shared_experts": 1,
    "num_experts_per_tok": 8,
    "n_group": 8,
    "topk_group": 4,
    "routed_scaling_factor": 2.5,
    "norm_topk_prob": True,
    "scoring_func": "sigmoid",
    "topk_method": "noaux_tc",
    "moe_layer_freq": 1,
    "first_k_dense_replace": 3,
    "q_lora_rank": 1536,
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "rms_norm_eps": 1e-6,
    "vocab_size": 129280,
    "num_nextn_predict_layers": 1,
    "rope_theta": 10000,
    "rope_scaling": {
        "type": "yarn",
        "factor": 40,
        "beta_fast": 32,
        "beta_slow": 1,
        "mscale": 1.0,
        "mscale_all_dim": 1.0,
        "original_max_position_embeddings": 4096,
    },
    "max_position_embeddings": 163840,
    "tie_word_embeddings": False,
    "attention_bias": False,
    "hidden_act": "silu",
    "bos_token_id": 0,
    "eos_token_id": 1,
    "quantization_config": {
        "activation_scheme": "dynamic",
        "fmt": "e4m3",
        "quant_method": "fp8",
        "weight_block_size": [128, 128],
    },
}


def published(folder: Path, config: dict[str, Any]) -> Path:
    (folder / "config.json").write_text(json.dumps(config))
    save_file({"w": torch.zeros(1)}, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def test_the_published_configuration_is_read(tmp_path: Path) -> None:
    config = initialize(published(tmp_path, DEEPSEEK_V3))
    # 192 ** -0.5 times the square of 0.1 ln 40 + 1.
    assert config.softmax_scale == pytest.approx(0.0721688 * 1.87386, rel=1e-5)
    assert config.cache_width == 576
    assert config.fp8_block == (128, 128)
    shapes = layer_shapes(config, 61)
    assert shapes["layers.61.self_attn.q_b_proj.weight"] == (24576, 1536)
    assert shapes["layers.61.self_attn.kv_b_proj.weight"] == (32768, 512)
    assert shapes["layers.61.self_attn.o_proj.weight"] == (7168, 16384)
    assert shapes["layers.61.mlp.experts.255.down_proj.weight"] == (7168, 2048)
    assert "layers.2.mlp.down_proj.weight" in layer_shapes(config, 2)


def test_another_quantisation_is_refused(tmp_path: Path) -> None:
    """Before any weight is read."""
    folder = published(tmp_path, DEEPSEEK_V3 | {"quantization_config": {"quant_method": "awq"}})
    with pytest.raises(InputError, match="quant_method 'awq'"):
        initialize(folder)


def test_a_target_cut_short_is_refused(tmp_path: Path) -> None:
    """A config.json that states too few layers is not that of the checkpoint."""
    folder = tiny_deepseek(tmp_path, **SHAPE)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 1}))
    tensors = read_tensors([folder / "model.safetensors"])
    with pytest.raises(InputError, match=r"model\.layers\.2\..* does not have"):
        target_state_dict(tensors, initialize(folder), source=str(folder))
