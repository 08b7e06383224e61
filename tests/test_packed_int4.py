"""Packed int4 checkpoints, as Kimi K2.5 is published: what is read is what was packed."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from reference.packed_int4 import SCHEME, pack, packed_parts, write_packed
from tiny import tiny_deepseek
from tiny.kimi import tiny_kimi

from unispec.checkpoints import Tensor, read_tensors
from unispec.checkpoints.packed_int4 import dequantise_packed
from unispec.engine import EngineConfig
from unispec.engine.pipeline_config import make_pipeline_config
from unispec.errors import InputError
from unispec.pipelines.targets.deepseek.config import DeepseekV3Config
from unispec.pipelines.targets.deepseek.weights import dequantised, target_state_dict
from unispec.pipelines.targets.kimi.config import KimiK2_5Config
from unispec.pipelines.targets.kimi.weights import language_tensors

LAYER = "model.layers.1.mlp.experts.0.up_proj"


def routed(name: str) -> bool:
    """What Kimi K2.5 packs: the projections of routed experts."""
    return ".mlp.experts." in name


def initialize(folder: Path, config: type[Any] = DeepseekV3Config) -> Any:
    return config.initialize(make_pipeline_config(EngineConfig(model=str(folder), max_length=64)))


def deepseek(folder: Path) -> Path:
    return tiny_deepseek(
        folder,
        q_lora_rank=24,
        n_routed_experts=4,
        n_group=1,
        topk_group=1,
        num_experts_per_tok=2,
        layers=2,
        first_k_dense_replace=1,
    )


def test_the_first_column_is_in_the_lowest_bits_with_eight_added() -> None:
    """Words written by hand: columns -8 to -1 are the digits 0 to 7, columns 0 to 7 are 8 to f."""
    packed = np.array([[0x76543210, 0xFEDCBA98]], np.uint32).view(np.int32)
    tensors: dict[str, Tensor] = {
        "l.weight_packed": packed,
        "l.weight_scale": np.array([[0.5, 2.0]], np.float32),
        "l.weight_shape": np.array([1, 16], np.int32),
    }
    read = dequantise_packed(tensors, 8, source="tiny")
    assert list(read) == ["l.weight"]
    expected = [*np.arange(-8, 0) * 0.5, *np.arange(8) * 2.0]
    np.testing.assert_array_equal(read["l.weight"], [expected])
    assert pack(torch.arange(-8, 8)[None]).tolist() == packed.tolist()


@pytest.mark.parametrize(
    ("shape", "group_size"), [((5, 64), 32), ((3, 13), 5), ((1, 1), 32), ((2, 40), 32), ((4, 8), 1)]
)
@pytest.mark.parametrize("scale_dtype", [torch.float32, torch.float16])
def test_what_torch_packed_is_read(
    shape: tuple[int, int], group_size: int, scale_dtype: torch.dtype
) -> None:
    """Groups and words need not divide the columns."""
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    parts, meant = packed_parts(weight, group_size)
    parts["scale"] = parts["scale"].to(scale_dtype)
    tensors: dict[str, Tensor] = {
        f"l.weight_{part}": value.numpy() for part, value in parts.items()
    }
    read = dequantise_packed({**tensors, "norm.weight": np.ones(3)}, group_size, source="tiny")
    assert read.keys() == {"l.weight", "norm.weight"}
    assert read["l.weight"].dtype == np.float32
    np.testing.assert_array_equal(read["l.weight"], meant.numpy())


def test_a_packed_deepseek_is_the_plain_one(tmp_path: Path) -> None:
    folder = deepseek(tmp_path)
    meant = write_packed(folder, 16, routed)
    tensors = read_tensors([folder / "model.safetensors"])
    assert f"{LAYER}.weight_packed" in tensors
    config = initialize(folder)
    assert (config.int4_group_size, config.fp8_block) == (16, None)
    state = target_state_dict(dequantised(tensors, config, source="tiny"), config, source="tiny")
    plain: dict[str, Tensor] = {name: tensor.numpy() for name, tensor in meant.items()}
    expected = target_state_dict(plain, config, source="tiny")
    assert state.keys() == expected.keys()
    for name, tensor in expected.items():
        np.testing.assert_array_equal(state[name], tensor, err_msg=name)


def test_a_packed_kimi_is_the_plain_one(tmp_path: Path) -> None:
    """Its scheme stands in the part for the text; tower and projector are as they were."""
    folder = tiny_kimi(tmp_path)
    meant = write_packed(folder, 32, routed)
    config = initialize(folder, KimiK2_5Config)
    assert config.int4_group_size == 32
    tensors = read_tensors([folder / "model.safetensors"])
    read = dequantised(language_tensors(tensors), config, source="tiny")
    expected = language_tensors({name: tensor.numpy() for name, tensor in meant.items()})
    assert read.keys() == expected.keys()
    for name, tensor in expected.items():
        np.testing.assert_array_equal(read[name], tensor, err_msg=name)
    target_state_dict(read, config, source="tiny")


def change(part: str, **to: Any) -> Callable[[dict[str, Any]], None]:
    """Sets keys of the scheme: at the top, in its group, or in what the group says of weights."""

    def apply(scheme: dict[str, Any]) -> None:
        group = scheme["config_groups"]["group_0"]
        {"top": scheme, "group": group, "weights": group["weights"]}[part].update(to)

    return apply


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        (change("weights", num_bits=8), ["num_bits 8", "is not 4"]),
        (change("weights", symmetric=False), ["symmetric False", "is not True"]),
        (change("weights", type="float"), ["type 'float'", "is not 'int'"]),
        (change("weights", strategy="channel"), ["strategy 'channel'", "is not 'group'"]),
        (change("weights", group_size=0), ["group_size 0", "positive integer"]),
        (change("weights", group_size=None), ["group_size None", "positive integer"]),
        (change("weights", group_size="32"), ["group_size '32'", "positive integer"]),
        (change("top", format="naive-quantized"), ["format 'naive-quantized'", "pack-quantized"]),
        (change("group", format="float-quantized"), ["format 'float-quantized'"]),
        (change("group", input_activations={"num_bits": 8}), ["input_activations", "num_bits"]),
        (change("group", weights=None), ["weights None", "no scheme"]),
        (change("top", config_groups={}), ["config_groups {}", "one scheme"]),
        (change("top", config_groups=None), ["config_groups None", "one scheme"]),
        (change("top", config_groups={"a": {}, "b": {}}), ["config_groups", "one scheme"]),
        (change("top", quant_method="gptq"), ["quant_method 'gptq'", "packed int4"]),
    ],
)
def test_schemes_that_are_refused(
    tmp_path: Path, changed: Callable[[dict[str, Any]], None], words: list[str]
) -> None:
    """Before any weight is read."""
    folder = deepseek(tmp_path)
    scheme = copy.deepcopy(SCHEME)
    changed(scheme)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": scheme}))
    with pytest.raises(InputError) as refused:
        initialize(folder)
    for word in (*words, "quantization_config of", str(folder)):
        assert word in str(refused.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"weight_scale": None}, r"has 'l\.weight_packed' without 'l\.weight_scale'"),
        ({"weight_shape": None}, r"has 'l\.weight_packed' without 'l\.weight_shape'"),
        ({"weight_packed": None}, r"has 'l\.weight_scale' without 'l\.weight_packed'"),
        ({"weight": np.zeros((4, 64))}, r"both 'l\.weight_packed' and 'l\.weight'"),
        ({"weight_packed": np.zeros((4, 8), np.int64)}, "dtype int64"),
        ({"weight_scale": np.zeros((4, 2), np.uint8)}, "its scale uint8"),
        ({"weight_shape": np.array([4], np.int32)}, r"weight_shape has shape \[1\]"),
        ({"weight_shape": np.array([4.0, 64.0])}, "dtype float64"),
        ({"weight_shape": np.array([4, 72], np.int32)}, r"\[4, 9\] and \[4, 3\] are expected"),
        ({"weight_shape": np.array([-4, 64], np.int32)}, r"for \[-4, 64\]"),
        ({"weight_packed": np.zeros((4, 7), np.int32)}, r"has shape \[4, 7\]"),
        ({"weight_packed": np.zeros(32, np.int32)}, r"has shape \[32\]"),
        ({"weight_scale": np.zeros((4, 1), np.float32)}, r"its scale \[4, 1\].*groups of 32"),
    ],
)
def test_parts_that_do_not_fit_are_refused(changes: dict[str, Any], message: str) -> None:
    parts: dict[str, Any] = {
        "weight_packed": np.zeros((4, 8), np.int32),
        "weight_scale": np.ones((4, 2), np.float32),
        "weight_shape": np.array([4, 64], np.int32),
    }
    assert dequantise_packed(named(parts), 32, source="tiny")["l.weight"].shape == (4, 64)
    with pytest.raises(InputError, match=message):
        dequantise_packed(named(parts | changes), 32, source="tiny")


def named(parts: dict[str, Any]) -> dict[str, Tensor]:
    return {f"l.{name}": part for name, part in parts.items() if part is not None}


def test_a_matrix_that_is_not_there_and_a_zero_point_are_refused(tmp_path: Path) -> None:
    folder = deepseek(tmp_path)
    write_packed(folder, 16, routed)
    config = initialize(folder)
    tensors = dict(read_tensors([folder / "model.safetensors"]))

    def state(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        plain = dequantised(tensors, config, source="tiny")
        return target_state_dict(plain, config, source="tiny")

    with pytest.raises(InputError, match=r"weight_zero_point.*does not have"):
        state(tensors | {f"{LAYER}.weight_zero_point": np.zeros((1, 1), np.int32)})
    scale = tensors[f"{LAYER}.weight_scale"]
    with pytest.raises(InputError, match=r"experts\.0\.up_proj\.weight' has .* NaN"):
        state(tensors | {f"{LAYER}.weight_scale": np.full_like(scale, np.nan)})
    without = {name: tensor for name, tensor in tensors.items() if not name.startswith(LAYER)}
    with pytest.raises(InputError, match=r"lacks tensor 'layers\.1\.mlp\.experts\.0\.up_proj"):
        state(without)
