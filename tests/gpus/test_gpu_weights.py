"""Weights of DeepSeek-V3 for GPUs: the checkpoint's, in FP8 where GPUs compute with it."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from deepseek_gpus import BLOCKS, CPU, LAYERS, SHAPE, assert_recorded, build, on_gpus
from max.driver import DeviceSpec
from max.dtype import DType
from max.graph import Weight
from max.nn import Module
from max.nn.quant_config import QuantConfig
from reference.packed_int4 import write_packed
from safetensors.numpy import load_file, save_file
from safetensors.torch import load_file as load_torch
from safetensors.torch import save_file as save_torch
from tiny import in_fp8_blocks, tiny_deepseek

from unispec.checkpoints import read_tensors
from unispec.checkpoints.block_fp8 import dequantise_blocks, quantise_blocks
from unispec.errors import InputError
from unispec.pipelines.architectures.max_entries import for_engines
from unispec.pipelines.drafts.mtp.weights import mtp_state_dict
from unispec.pipelines.targets.deepseek import fp8
from unispec.pipelines.targets.deepseek.config import DeepseekV3Config
from unispec.pipelines.targets.deepseek.weights import dequantised, target_state_dict
from unispec.pipelines.unified.weights import load_weights

WEIGHTS = "model.safetensors"


def test_weights_for_gpus_are_the_checkpoint_s(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    state = target_state_dict(tensors, on_gpus(folder), source="tiny")
    for name, tensor in state.items():
        original = tensors.get(f"model.{name}", tensors.get(name))
        np.testing.assert_array_equal(tensor, original, err_msg=name)


@pytest.fixture(scope="module")
def fp8_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Rotated columns are half a head apart."""
    folder = tmp_path_factory.mktemp("fp8")
    return in_fp8_blocks(tiny_deepseek(folder, **BLOCKS, rope_interleave=False), (128, 128))


@pytest.mark.parametrize("parallelism", ["tensor", "expert"])
def test_fp8_matrices_stay_fp8_where_gpus_compute_with_them(
    fp8_folder: Path, parallelism: str
) -> None:
    """The graphs of two GPUs; scales have their matrices' names."""
    graphs = build(2, fp8_folder, parallelism)
    how = "have some experts each" if parallelism == "expert" else "share all"
    assert_recorded(graphs, f"2 GPUs {how}, FP8")
    weights = graphs["weights"]
    tensors = load_torch(fp8_folder / "model.safetensors")
    scales = {name: tensor for name, tensor in tensors.items() if name.endswith("_scale_inv")}
    found = {name: value for name, value in weights.items() if name.endswith("_scale")}
    assert len(found) == len(scales)
    assert {dtype for dtype, _ in found.values()} == {"float32"}
    matrices = {name.removesuffix("_scale") for name in found}
    assert {name for name, (dtype, _) in weights.items() if dtype == "float8_e4m3fn"} == matrices
    scale = scales[f"model.layers.{LAYERS - 1}.self_attn.o_proj.weight_scale_inv"]
    assert found[f"target.layers.{LAYERS - 1}.self_attn.o_proj.weight_scale"][1] == [*scale.shape]
    spread = parallelism == "expert"
    inner = 256 if spread else 128
    assert graphs["shards"]["down_proj"] == [[5 if spread else 8, 128, inner]] * 2
    assert graphs["shards"]["query"] == [[(8 if spread else 4) * 192, 128]] * 2


def test_fp8_matrices_and_scales_are_the_checkpoint_s(fp8_folder: Path) -> None:
    """Multiplied, they are what a stack gets that does not compute in FP8."""
    tensors = read_tensors([fp8_folder / "model.safetensors"])
    fp8 = QuantConfig.blockscaled_fp8(mlp_quantized_layers=[], attn_quantized_layers=[])

    def state(fp8: QuantConfig | None) -> tuple[dict[str, Any], dict[str, Any]]:
        config = on_gpus(fp8_folder, fp8=fp8)
        found = dequantised(tensors, config, source="tiny")
        return (
            target_state_dict(found, config, source="tiny"),
            mtp_state_dict(found, config, source="tiny"),
        )

    for codes, plain in zip(state(fp8), state(None), strict=True):
        assert any(tensor.dtype == np.uint8 for tensor in codes.values())
        named = {name.replace("_scale", "_scale_inv"): codes[name] for name in codes}
        multiplied = dequantise_blocks(named, (128, 128), source="tiny")
        assert multiplied.keys() == plain.keys()
        for name, tensor in plain.items():
            np.testing.assert_array_equal(multiplied[name], tensor, err_msg=name)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda codes: np.where(codes == codes[0, 0], 0x7F, codes), r"has \d+ NaN or infinite"),
        (lambda codes: codes.astype(np.float32), "has dtype float32 and scales, expected float8"),
    ],
    ids=["not a number", "not FP8"],
)
def test_a_damaged_fp8_matrix_is_refused(fp8_folder: Path, change: Any, message: str) -> None:
    name = "model.layers.0.self_attn.o_proj.weight"
    tensors = {**read_tensors([fp8_folder / "model.safetensors"])}
    tensors[name] = change(tensors[name])
    blocks = QuantConfig.blockscaled_fp8(mlp_quantized_layers=[], attn_quantized_layers=[])
    config = on_gpus(fp8_folder, fp8=blocks)
    with pytest.raises(InputError, match=f"tiny: tensor '{name}' {message}"):
        target_state_dict(dequantised(tensors, config, source="tiny"), config, source="tiny")


@pytest.mark.parametrize("form", ["float32", "packed int4", "blocks of 64 x 32"])
def test_what_is_not_in_fp8_is_rounded_to_it(tmp_path: Path, form: str) -> None:
    """As torch rounds the numbers that the checkpoint stands for."""
    folder = tiny_deepseek(tmp_path / "plain", **BLOCKS)
    changes: dict[str, Any] = {}
    if form == "packed int4":
        changes["int4_group_size"] = 32
        meant = write_packed(folder, 32, lambda name: ".experts." in name and "proj" in name)
        copy = tiny_deepseek(tmp_path / "meant", **BLOCKS)
        save_torch({name: one.contiguous() for name, one in meant.items()}, copy / WEIGHTS)
    elif form == "float32":
        copy = tiny_deepseek(tmp_path / "meant", **BLOCKS)
    else:
        in_fp8_blocks(folder, (64, 32))
        changes["fp8_block"] = (64, 32)
        values = dequantise_blocks(read_tensors([folder / WEIGHTS]), (64, 32), source="tiny")
        copy = tiny_deepseek(tmp_path / "meant", **BLOCKS)
        save_file({name: np.ascontiguousarray(one) for name, one in values.items()}, copy / WEIGHTS)
    numbers = load_torch(copy / WEIGHTS)
    expected = load_torch(in_fp8_blocks(copy, (128, 128)) / WEIGHTS)
    blocks = QuantConfig.blockscaled_fp8(mlp_quantized_layers=[], attn_quantized_layers=[])
    config = on_gpus(folder, fp8=blocks, **changes)
    found = dequantised(read_tensors([folder / WEIGHTS]), config, source="tiny")
    assert {name.replace("_scale", "_scale_inv") for name in found} == expected.keys()
    for name, tensor in expected.items():
        ours = torch.from_numpy(np.array(found[name.replace("_scale_inv", "_scale")]))
        if tensor.dtype == torch.float8_e4m3fn:
            plain = numbers[name]
            scale = expected[name + "_scale_inv"].repeat_interleave(128, 0)
            scale = scale.repeat_interleave(128, 1)[: plain.shape[0], : plain.shape[1]]
            errors = [
                (values.view(torch.float8_e4m3fn).float() * scale - plain).abs()
                for values in (ours, tensor)
            ]
            # Of two that are equally near, rounding of the quotient decides.
            torch.testing.assert_close(*errors, rtol=1e-5, atol=1e-9)
        else:
            torch.testing.assert_close(ours.to(tensor.dtype), tensor, rtol=2e-7, atol=0)
    target_state_dict(found, config, source="tiny")
    mtp_state_dict(found, config, source="tiny")


def test_a_number_that_is_none_is_refused_where_it_is_rounded(tmp_path: Path) -> None:
    folder = tiny_deepseek(tmp_path, **BLOCKS)
    name = "model.layers.1.mlp.experts.3.up_proj.weight"
    tensors = {**read_tensors([folder / WEIGHTS])}
    tensors[name] = tensors[name].copy()
    tensors[name][3, 5] = np.inf
    blocks = QuantConfig.blockscaled_fp8(mlp_quantized_layers=[], attn_quantized_layers=[])
    config = on_gpus(folder, fp8=blocks)
    with pytest.raises(InputError, match=f"tiny: tensor '{name}' has 1 NaN or infinite"):
        target_state_dict(dequantised(tensors, config, source="tiny"), config, source="tiny")


@pytest.mark.parametrize("block", [(128, 128), (48, 40), (1, 256)])
def test_every_number_becomes_the_float8_that_torch_finds(block: tuple[int, int]) -> None:
    """The largest of each block is 448 and the scale 1, so that nothing else is rounded."""
    halves = np.arange(1, 1 << 11, dtype=np.float32) * 2.0**-12  # between all subnormals
    rng = np.random.default_rng(0)
    spread = rng.normal(0, 1, 192 * 256 - halves.size) * 2.0 ** rng.integers(-12, 8, 1)
    matrix = np.concatenate([halves, spread.astype(np.float32)]).reshape(192, 256).clip(-448, 448)
    matrix[:: block[0], :: block[1]] = -448
    codes, scales = quantise_blocks(matrix, block)
    assert scales.shape == (-(-192 // block[0]), -(-256 // block[1]))
    np.testing.assert_array_equal(scales, 1)
    expected = torch.from_numpy(matrix).to(torch.float8_e4m3fn).view(torch.uint8)
    np.testing.assert_array_equal(codes, expected.numpy())


def test_a_block_of_nothing_stays_nothing() -> None:
    codes, scales = quantise_blocks(np.zeros((3, 5), np.float32), (2, 4))
    assert codes.tolist() == [[0] * 5] * 3
    np.testing.assert_array_equal(scales, np.ones((2, 2)))


class Matrix(Module):
    """One matrix of float8."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        super().__init__()
        self.weight = Weight("weight", DType.float8_e4m3fn, shape, CPU)

    def __call__(self) -> None: ...


def test_float8_is_what_torch_reads(fp8_folder: Path) -> None:
    name = "model.layers.0.self_attn.o_proj.weight"
    codes = read_tensors([fp8_folder / "model.safetensors"])[name]
    expected = load_torch(fp8_folder / "model.safetensors")[name]
    module = Matrix(codes.shape)
    load_weights(module, {"weight": codes})
    loaded: Any = module.state_dict()["weight"]
    assert loaded.dtype == DType.float8_e4m3fn
    read = loaded.view(DType.uint8, codes.shape).to_numpy()
    values = torch.from_numpy(read.copy()).view(torch.float8_e4m3fn)
    assert torch.equal(values.float(), expected.float())


@pytest.mark.parametrize(
    ("changes", "block", "count", "spread", "obstacle"),
    [
        ({}, (128, 128), 1, False, None),
        ({}, (128, 128), 2, False, None),
        ({}, (128, 128), 2, True, None),
        ({}, (128, 128), 4, False, "a device's part of intermediate_size is 64, no multiple"),
        ({"moe_intermediate_size": 128}, (128, 128), 2, False, "moe_intermediate_size is 64"),
        ({"moe_intermediate_size": 128}, (128, 128), 2, True, None),
        ({"num_attention_heads": 2}, (128, 128), 2, False, "a device's queries is 192"),
        ({"hidden_size": 64}, (128, 128), 1, False, "hidden_size is 64"),
        ({"q_lora_rank": None}, (128, 128), 1, False, "q_lora_rank is not set"),
        ({}, (64, 128), 1, False, None),
        ({}, None, 1, False, None),
    ],
)
def test_when_gpus_compute_in_fp8(
    monkeypatch: pytest.MonkeyPatch,
    changes: dict[str, Any],
    block: tuple[int, int] | None,
    count: int,
    spread: bool,
    obstacle: str | None,
) -> None:
    """Where it is possible, if the checkpoint is in the kernels' blocks or it is asked for."""
    hf: Any = SimpleNamespace(
        **{
            "hidden_size": 128,
            "q_lora_rank": 128,
            "kv_lora_rank": 512,
            "num_attention_heads": 8,
            "qk_nope_head_dim": 128,
            "qk_rope_head_dim": 64,
            "v_head_dim": 128,
            "intermediate_size": 256,
            "moe_intermediate_size": 256,
            "num_hidden_layers": 3,
            "first_k_dense_replace": 1,
            "n_group": 2,
            "n_routed_experts": 8,
            "n_shared_experts": 1,
            "num_experts_per_tok": 2,
            "topk_group": 1,
            **changes,
        },
        quantization_config=block and {"quant_method": "fp8", "weight_block_size": list(block)},
    )
    hf.get_text_config = lambda: hf
    architecture = "sm_90a"
    monkeypatch.setattr(fp8, "accelerator_api", lambda: "cuda")
    monkeypatch.setattr(fp8, "accelerator_architecture_name", lambda: architecture)

    def found(asked: str | None, devices: list[DeviceSpec]) -> str:
        model: Any = SimpleNamespace(
            huggingface_config=hf,
            model_name="tiny",
            quantization_encoding=asked,
            device_specs=devices,
        )
        return DeepseekV3Config.choose_encoding(model, spread=spread)

    cpu = [DeviceSpec.cpu()]
    gpus = [DeviceSpec(id=index, device_type="gpu") for index in range(count)]
    stored_so = obstacle is None and block == (128, 128)
    assert found(None, gpus) == ("float8_e4m3fn" if stored_so else "bfloat16")
    if obstacle is None:
        assert found("float8_e4m3fn", gpus) == "float8_e4m3fn"
    assert found("bfloat16", gpus) == "bfloat16"
    assert found(None, cpu) == "float32"
    if obstacle is not None:
        with pytest.raises(
            InputError, match=f"'float8_e4m3fn' of tiny .*{obstacle}.*use 'float32'"
        ):
            found("float8_e4m3fn", gpus)
    with pytest.raises(InputError, match="the device has no kernels"):
        found("float8_e4m3fn", cpu)
    architecture = "sm_80"
    assert found(None, gpus) == "bfloat16"
    with pytest.raises(InputError, match="the device has no kernels"):
        found("float8_e4m3fn", gpus)


def test_max_may_choose_fp8() -> None:
    entries = {entry.name: entry for entry in for_engines()}
    target = entries["DeepseekV3ForCausalLM"]
    assert "float8_e4m3fn" in target.supported_encodings
    assert entries["UnifiedMTPDeepseekV3ForCausalLM"].base is target


@pytest.mark.parametrize(
    ("name", "scale", "message"),
    [
        ("model.layers.0.self_attn.o_proj.weight", None, r"o_proj.weight' has no scales"),
        ("model.layers.3.eh_proj.weight", np.ones((1, 2)), r"eh_proj.weight' has scales"),
    ],
)
def test_a_checkpoint_partly_in_fp8_is_refused_where_layers_compute_in_it(
    fp8_folder: Path, name: str, scale: Any, message: str
) -> None:
    tensors = {**read_tensors([fp8_folder / "model.safetensors"])}
    blocks = QuantConfig.blockscaled_fp8(mlp_quantized_layers=[], attn_quantized_layers=[])
    config = on_gpus(fp8_folder, fp8=blocks)
    tensors.pop(name + "_scale_inv", None)
    if scale is not None:
        tensors[name + "_scale_inv"] = scale
    with pytest.raises(InputError, match=message + ".*use a checkpoint that has them so"):
        dequantised(tensors, config, source="tiny")
    plain = dequantised(tensors, on_gpus(fp8_folder), source="tiny")
    assert not any("_scale" in found for found in plain)


@pytest.mark.parametrize("q_lora_rank", [24, None])
def test_columns_that_rotate_together_become_neighbours(
    tmp_path: Path, q_lora_rank: int | None
) -> None:
    """Scores after the kernel's rotation are those of the checkpoint's own."""
    shape = {**SHAPE, "q_lora_rank": q_lora_rank, "rope_interleave": False}
    folder = tiny_deepseek(tmp_path, **shape)
    tensors = load_file(folder / "model.safetensors")
    config = on_gpus(folder)
    target = target_state_dict(tensors, config, source="tiny")
    draft = mtp_state_dict(tensors, config, source="tiny")
    query = "q_proj" if q_lora_rank is None else "q_b_proj"
    rng = np.random.default_rng(0)
    angles = rng.uniform(0, 6, (2, 32))  # of two positions

    def scores(state: Any, prefix: str, *, neighbours: bool) -> Any:
        q = state[f"{prefix}.{query}.weight"].astype(np.float64)
        k = state[f"{prefix}.kv_a_proj_with_mqa.weight"].astype(np.float64)
        q = q.reshape(8, 192, -1) @ np.ones(q.shape[1])  # [heads, 192]
        k = k @ np.ones(k.shape[1])  # [576]
        rotated = [
            rotate(part, angle, neighbours=neighbours)
            for part, angle in zip((q[:, 128:], k[None, 512:]), angles, strict=True)
        ]
        return rotated[0] @ rotated[1][0], q[:, :128], k[:512]

    for state, prefix, layer in ((target, "layers.1", 1), (draft, "layer", LAYERS)):
        ours = scores(state, f"{prefix}.self_attn", neighbours=True)
        theirs = scores(tensors, f"model.layers.{layer}.self_attn", neighbours=False)
        for found, expected in zip(ours, theirs, strict=True):
            np.testing.assert_allclose(found, expected, rtol=1e-9)


def rotate(x: Any, angles: Any, *, neighbours: bool) -> Any:
    """Rotates pairs of columns of `[N, 64]` by 32 angles."""
    pairs = x.reshape(-1, 32, 2) if neighbours else x.reshape(-1, 2, 32).swapaxes(1, 2)
    first, second = pairs[..., 0], pairs[..., 1]
    cos, sin = np.cos(angles), np.sin(angles)
    turned = np.stack([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return turned.reshape(len(x), -1) if neighbours else turned.swapaxes(1, 2).reshape(len(x), -1)
