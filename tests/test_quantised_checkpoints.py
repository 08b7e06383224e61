"""Checkpoints in quantised formats that are not read: one sentence for all, which names the format.

The keys and names are those of published checkpoints, or of the tools that write them.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from max.engine import InferenceSession
from safetensors.torch import load_file, save_file
from tiny import TinyPair

from unispec.engine import Engine, EngineConfig
from unispec.errors import InputError

NOT_SUPPORTED = "this quantised format is not supported; "
USE = NOT_SUPPORTED + "use the checkpoint that is not quantised, or a GGUF file"
USE_DEEPSEEK = NOT_SUPPORTED + (
    "use a checkpoint in fp8 blocks or packed int4, or one that is not quantised"
)

CONFIGS: Mapping[str, tuple[dict[str, Any], str]] = {
    "AWQ": (
        {"bits": 4, "group_size": 128, "quant_method": "awq", "version": "gemm"},
        "quant_method 'awq', bits 4, group_size 128",
    ),
    "GPTQ": (
        {"bits": 4, "checkpoint_format": "gptq", "desc_act": True, "quant_method": "gptq"},
        "quant_method 'gptq', bits 4",
    ),
    "bitsandbytes": (
        {
            "_load_in_4bit": True,
            "bnb_4bit_quant_type": "nf4",
            "load_in_4bit": True,
            "load_in_8bit": False,
            "quant_method": "bitsandbytes",
        },
        "quant_method 'bitsandbytes', load_in_4bit True, bnb_4bit_quant_type 'nf4'",
    ),
    "bitsandbytes, 8 bits": (
        {"load_in_4bit": False, "load_in_8bit": True, "quant_method": "bitsandbytes"},
        "quant_method 'bitsandbytes', load_in_8bit True",
    ),
    "compressed-tensors, float8": (
        {"quant_method": "compressed-tensors", "format": "float-quantized", "ignore": ["lm_head"]},
        "quant_method 'compressed-tensors', format 'float-quantized'",
    ),
    "float8 by fbgemm": (
        {"quant_method": "fbgemm_fp8", "activation_scale_ub": 1200.0},
        "quant_method 'fbgemm_fp8'",
    ),
    "float8 with one scale": (
        {"quant_method": "fp8", "activation_scheme": "static"},
        "quant_method 'fp8'",
    ),
    "HQQ": (
        {"quant_method": "hqq", "quant_config": {"weight_quant_params": {"nbits": 4}}},
        "quant_method 'hqq'",
    ),
    "modelopt, float8": (
        {"quant_method": "modelopt", "quant_algo": "FP8", "producer": {"name": "modelopt"}},
        "quant_method 'modelopt', quant_algo 'FP8'",
    ),
    "modelopt, NVFP4": (
        {"quant_method": "modelopt", "quant_algo": "NVFP4"},
        "quant_method 'modelopt', quant_algo 'NVFP4'",
    ),
    "MLX": ({"group_size": 64, "bits": 4}, "bits 4, group_size 64"),
    "of tomorrow": ({"brand": "new"}, "only brand"),
}


@pytest.fixture(autouse=True)
def no_compile(monkeypatch: pytest.MonkeyPatch) -> None:
    def load(*arguments: object, **options: object) -> None:
        raise AssertionError("the compile was reached")

    monkeypatch.setattr(InferenceSession, "load", load)
    monkeypatch.setattr(InferenceSession, "load_all", load)


@pytest.fixture
def pair(tiny_pair: Callable[[str], TinyPair], tmp_path: Path) -> TinyPair:
    """A sound target and its draft, to be quantised."""
    sound = tiny_pair("llama_eagle")
    assert sound.draft is not None
    return TinyPair(
        Path(shutil.copytree(sound.target, tmp_path / "target")),
        Path(shutil.copytree(sound.draft, tmp_path / "draft")),
    )


def refusal(pair: TinyPair, **options: Any) -> str:
    if pair.draft is not None:
        options |= {"draft_model": str(pair.draft), "speculative_method": "eagle"}
    with pytest.raises(InputError) as refused:
        _ = Engine(EngineConfig(model=str(pair.target), **options)).pipeline
    return str(refused.value)


def state(folder: Path, **fields: Any) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("part", ["target", "draft"])
def test_the_format_that_config_json_states_is_named(pair: TinyPair, part: str, name: str) -> None:
    stated, form = CONFIGS[name]
    folder = getattr(pair, part)
    state(folder, quantization_config=stated)
    assert refusal(pair) == f"quantization_config of {folder} says {form}: {USE}"


@pytest.mark.parametrize("key", ["compression_config", "quantization"])
def test_under_the_key_of_another_tool(pair: TinyPair, key: str) -> None:
    state(pair.target, **{key: {"bits": 4}})
    assert refusal(pair) == f"quantization_config of {pair.target} says bits 4: {USE}"


@pytest.mark.parametrize("preset", ["deepseek_mtp_agreeing", "kimi_dflash"])
@pytest.mark.parametrize(
    "name", ["AWQ", "bitsandbytes", "float8 with one scale", "modelopt, NVFP4"]
)
def test_deepseek_and_kimi_read_two_formats(
    tiny_pair: Callable[[str], TinyPair], tmp_path: Path, preset: str, name: str
) -> None:
    stated, form = CONFIGS[name]
    folder = Path(shutil.copytree(tiny_pair(preset).target, tmp_path / "target"))
    text = json.loads((folder / "config.json").read_text()).get("text_config")
    if text is None:
        state(folder, quantization_config=stated)
    else:
        state(folder, text_config=text | {"quantization_config": stated})
    message = refusal(TinyPair(folder, None))
    assert message == f"quantization_config of {folder} says {form}: {USE_DEEPSEEK}"


E4M3 = torch.float8_e4m3fn
Parts = dict[str, torch.Tensor]

TENSORS: Mapping[str, tuple[Callable[[torch.Tensor], Parts], str, str]] = {
    "AWQ": (
        lambda w: {
            "qweight": torch.zeros(w.shape[1], w.shape[0] // 8, dtype=torch.int32),
            "qzeros": torch.zeros(1, w.shape[0] // 8, dtype=torch.int32),
            "scales": torch.ones(1, w.shape[0], dtype=torch.float16),
        },
        "qweight",
        "AWQ or GPTQ",
    ),
    "GPTQ": (
        lambda w: {
            "qweight": torch.zeros(w.shape[1] // 8, w.shape[0], dtype=torch.int32),
            "scales": torch.ones(1, w.shape[0], dtype=torch.float16),
            "g_idx": torch.zeros(w.shape[1], dtype=torch.int32),
        },
        "g_idx",
        "GPTQ",
    ),
    "bitsandbytes": (
        lambda w: {
            "weight": torch.zeros(w.numel() // 2, 1, dtype=torch.uint8),
            "weight.absmax": torch.zeros(w.numel() // 64, dtype=torch.uint8),
            "weight.quant_map": torch.zeros(16),
        },
        "weight.absmax",
        "bitsandbytes, 4 bits",
    ),
    "bitsandbytes, 8 bits": (
        lambda w: {"weight": w.to(torch.int8), "SCB": torch.ones(w.shape[0])},
        "SCB",
        "bitsandbytes, 8 bits",
    ),
    "compressed-tensors, packed": (
        lambda w: {
            "weight_packed": torch.zeros(w.shape[0], w.shape[1] // 8, dtype=torch.int32),
            "weight_scale": torch.ones(w.shape[0], 1),
        },
        "weight_packed",
        "compressed-tensors, packed",
    ),
    "float8 in blocks": (
        lambda w: {"weight": w.to(E4M3), "weight_scale_inv": torch.ones(1, 1)},
        "weight_scale_inv",
        "float8 in blocks",
    ),
    "float8 with scales": (
        lambda w: {
            "weight": w.to(E4M3),
            "weight_scale": torch.tensor(0.01),
            "input_scale": torch.tensor(0.01),
        },
        "weight_scale",
        "float8 or int8 with scales",
    ),
    "NVFP4": (
        lambda w: {
            "weight": torch.zeros(w.shape[0], w.shape[1] // 2, dtype=torch.uint8),
            "weight_scale": torch.ones(w.shape[0], w.shape[1] // 16).to(E4M3),
            "weight_scale_2": torch.tensor(0.01),
        },
        "weight_scale_2",
        "NVFP4 (modelopt)",
    ),
    "HQQ": (
        lambda w: {"W_q": torch.zeros(w.numel() // 2, dtype=torch.uint8), "scale": torch.ones(1)},
        "W_q",
        "HQQ",
    ),
    "MLX": (
        lambda w: {
            "weight": torch.zeros(w.shape[0], w.shape[1] // 8, dtype=torch.int32),
            "scales": torch.ones(w.shape[0], 1),
            "biases": torch.ones(w.shape[0], 1),
        },
        "biases",
        "MLX",
    ),
}


def quantise(folder: Path, change: Callable[[torch.Tensor], Parts]) -> str:
    """Quantises every q_proj, without a word in config.json; returns the first one's prefix."""
    file = folder / "model.safetensors"
    stored, first = {}, ""
    for name, tensor in load_file(file).items():
        layer, _, is_weight = name.rpartition(".")
        if not layer.endswith("q_proj") or is_weight != "weight":
            stored[name] = tensor
            continue
        first = first or layer
        stored |= {f"{layer}.{part}": value for part, value in change(tensor).items()}
    save_file(stored, file, metadata={"format": "pt"})
    return first


@pytest.mark.parametrize("name", TENSORS)
@pytest.mark.parametrize("part", ["target", "draft"])
def test_the_format_that_only_the_tensors_tell_is_named(
    pair: TinyPair, part: str, name: str
) -> None:
    """As in nvidia's first float8 checkpoints, whose config.json says nothing of it."""
    change, mark, form = TENSORS[name]
    folder = getattr(pair, part)
    first = quantise(folder, change)
    assert refusal(pair) == f"tensor '{first}.{mark}' of {folder} says {form}: {USE}"


def test_float8_without_scales(pair: TinyPair) -> None:
    first = quantise(pair.target, lambda w: {"weight": w.to(E4M3)})
    message = refusal(pair)
    assert message.startswith(f"{pair.target}: tensor '{first}.weight' has dtype uint8, which is")
    assert message.endswith(f"float8 or packed, expected floating point: {USE}")


def test_float8_of_another_kind(pair: TinyPair) -> None:
    first = quantise(pair.target, lambda w: {"weight": w.to(torch.float8_e5m2)})
    file = pair.target / "model.safetensors"
    assert refusal(pair) == f"tensor '{first}.weight' of {file} says dtype F8_E5M2: {USE}"
