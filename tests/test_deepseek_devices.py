"""DeepSeek-V3 on GPUs, without GPUs: the graphs are built and verified, not compiled."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from max.driver import CPU as CPUDevice
from max.driver import Buffer
from max.dtype import DType
from max.graph import DeviceRef
from max.graph.weights import WeightData
from max.nn.quant_config import QuantConfig
from max.pipelines.context import TextContext, TokenBuffer
from max.pipelines.lib import UnifiedEagleOutputs
from max.pipelines.modeling.types import TextGenerationInputs
from safetensors.numpy import load_file, save_file
from safetensors.torch import load_file as load_torch
from tiny import in_fp8_blocks, tiny_deepseek

from unispec.checkpoints import read_tensors
from unispec.checkpoints.block_fp8 import dequantise_blocks
from unispec.engine import EngineConfig
from unispec.errors import InputError
from unispec.pipelines.architectures.unified_mtp_deepseekV3.arch import (
    ARCHITECTURE as SPECULATOR,
)
from unispec.pipelines.drafts.mtp.weights import mtp_state_dict
from unispec.pipelines.runtime.batch import BatchBuilder
from unispec.pipelines.runtime.pipeline import SpeculativePipeline
from unispec.pipelines.targets.deepseek import fp8
from unispec.pipelines.targets.deepseek.arch import ARCHITECTURE
from unispec.pipelines.targets.deepseek.config import DeepseekV3Config
from unispec.pipelines.targets.deepseek.fp8 import block_scaled
from unispec.pipelines.targets.deepseek.inputs import (
    DeepseekV3Inputs,
    distributed_types,
)
from unispec.pipelines.targets.deepseek.model import DeepseekV3Model
from unispec.pipelines.targets.deepseek.placement import (
    check_gpus,
    check_one_cpu,
    check_placement,
    expert_parallelism,
    spread_over,
)
from unispec.pipelines.targets.deepseek.weights import (
    cast_stack,
    dequantised,
    target_state_dict,
)

LAYERS = 3
SHAPE: dict[str, Any] = {
    "q_lora_rank": 24,
    "n_routed_experts": 8,
    "n_group": 2,
    "topk_group": 1,
    "num_experts_per_tok": 2,
    "layers": LAYERS,
    "first_k_dense_replace": 1,
    "rope": "yarn",
    "heads": 8,
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
}
"""Attention as wide as the kernels for GPUs need it, all else tiny."""

BLOCKS: dict[str, Any] = {
    **SHAPE,
    "q_lora_rank": 128,
    "hidden_size": 128,
    "moe_intermediate_size": 256,
}
"""Of whole FP8 blocks, also where two devices share them."""

CPU, GPUS = DeviceRef.CPU(), [DeviceRef.GPU(index) for index in range(8)]
COPIES = ("embed_tokens.weight", "shared_head.head.weight")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_deepseek(tmp_path_factory.mktemp("deepseek"), **SHAPE)


class Built(NamedTuple):
    """What `virtual_gpus.py` says of the graphs of some GPUs."""

    count: int
    spread: bool
    """Whether each GPU has rows of its own and some of the experts."""
    graphs: dict[str, Any]


SHARED = [
    pytest.param((1, "tensor"), id="one GPU"),
    pytest.param((2, "tensor"), id="2 share all"),
    pytest.param((8, "tensor"), id="8 share all"),
    pytest.param((2, "expert"), id="2 have some experts each"),
    pytest.param((8, "expert"), id="8 have one expert each"),
]


@pytest.fixture(scope="module", params=SHARED)
def built(request: pytest.FixtureRequest, folder: Path) -> Built:
    count, parallelism = request.param
    return Built(count, parallelism == "expert", build(count, folder, parallelism))


def build(count: int, folder: Path, parallelism: str, *options: str) -> dict[str, Any]:
    script = Path(__file__).parent / "virtual_gpus.py"
    done = subprocess.run(
        [sys.executable, str(script), str(count), str(folder), parallelism, *options],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    described: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return described


def expected_inputs(count: int, caches: dict[str, int], *, drafts: bool, spread: bool) -> list[Any]:
    """The documented order, written down once more; what stands for one device each is a list."""
    gpus = [f"gpu:{index}" for index in range(count)]
    cpu, first = "cpu:0", gpus[0]
    head = [
        ["int64", first],  # tokens
        ["uint32", first],  # input_row_offsets
        ["uint32", cpu],  # host_input_row_offsets
        ["int64", cpu],  # return_n_logits
        ["int64", cpu],  # data_parallel_splits
        *([["uint8", gpu] for gpu in gpus] if count > 1 else []),  # signal_buffers
    ]
    for _ in caches:
        for gpu in gpus:
            head += [
                ["bfloat16", gpu],  # pages
                ["uint32", gpu],  # cache_lengths
                ["uint32", gpu],  # lookup_table
                ["uint32", cpu],  # max_prompt_length
                ["uint32", cpu],  # max_cache_length
                ["int64", cpu],  # page_stride
                *[["int64", gpu]] * (1 + drafts),  # attention_dispatch_metadata
                *[["int64", cpu]] * (1 + drafts),  # mla_num_partitions
            ]
    counters = [["int32", gpu] for _ in range(2) for gpu in gpus]
    pointers = [["uint64", cpu]] * 6  # of two groups each: to send, to receive, how many
    return [
        *head,
        *[["int32", cpu] for _ in gpus],  # batch_context_lengths
        *([*counters, *pointers] if spread else []),  # ep_inputs
        ["int64", first],  # draft_tokens
        ["uint64", first],  # seed
        ["float32", first],  # temperature
        ["int64", first],  # top_k
        ["int64", cpu],  # max_k
        ["float32", first],  # top_p
        ["float32", cpu],  # min_top_p
    ]


@pytest.mark.parametrize(("name", "caches"), [("alone", 1), ("unified", 2)])
def test_inputs_stand_in_the_documented_order(built: Built, name: str, caches: int) -> None:
    count, spread, graphs = built
    depths = dict(list({"target": LAYERS, "draft": 1}.items())[:caches])
    expected = expected_inputs(count, depths, drafts=caches == 2, spread=spread)
    inputs = graphs[name]["inputs"]
    assert [[dtype, device] for _, dtype, _, device in inputs[: len(expected)]] == expected
    # What unispec adds is for acceptance, which the first device decides alone.
    assert {device for *_, device in inputs[len(expected) :]} <= {"gpu:0", "cpu:0"}
    assert len(inputs) == len(expected) + 11
    assert inputs[4][2] == [str(count + 1 if spread else 2)]  # data_parallel_splits
    pages = [shape for kind, _, shape, _ in inputs if kind == "BufferType" and len(shape) > 1]
    assert [shape[1:] for shape in pages] == [
        ["1", str(depth), "128", "1", "576"] for depth in depths.values() for _ in range(count)
    ]
    assert {device for *_, device in graphs[name]["outputs"]} == {"gpu:0"}


def test_devices_speak_with_each_other_only_if_there_are_several(built: Built) -> None:
    """Two sums a layer that is shared, or experts far away, in the draft's loop and before it;
    target layers are subgraphs and not counted."""
    count, spread, graphs = built
    collectives = graphs["unified"]["collectives"]
    if count == 1:
        assert set(collectives.values()) == {0}
        return
    embeddings, draft_layers = 3, 2
    assert collectives["allreduce.sum"] == embeddings + (0 if spread else 2 * draft_layers)
    assert collectives["ep.dispatch"] == (draft_layers if spread else 0)
    assert collectives["ep.combine"] == collectives["ep.dispatch"]
    assert collectives["allgather"] == 3
    assert graphs["alone"]["collectives"]["allgather"] == 1


@pytest.mark.parametrize(("count", "parallelism"), [(1, "tensor"), (2, "expert")])
def test_masks_may_come_late(folder: Path, count: int, parallelism: str) -> None:
    """Behind the target the first GPU waits for them, copies them and reads the copy."""
    described = build(count, folder, parallelism, "--late-masks")["unified"]
    inputs = described["inputs"]
    mask = ["batch", "num_positions", "8"]  # a bit for each of 256 tokens
    assert inputs[-3:] == [
        ["TensorType", "int32", mask, "cpu:0"],
        ["BufferType", "int64", ["2"], "cpu:0"],
        ["BufferType", "int32", mask, "gpu:0"],
    ]
    assert ["TensorType", "int32", mask, "gpu:0"] not in inputs
    pinned, payload, scratch = (f"%arg{len(inputs) - place}" for place in (3, 2, 1))

    steps = [
        (kernel or operation.strip(), results.split(", "), operands.split(", "))
        for results, operation, kernel, operands in described["masks"]
    ]
    begin = next(i for i, (name, *_) in enumerate(steps) if name == "wait_host_value_with_dep")
    assert [name for name, *_ in steps[:begin]].count("mo.call") >= LAYERS
    (_, (waited,), waits), (copy, (copied,), copies), (load, _, loads), (last, *_) = steps[begin:]
    assert (copy, load, last) == ("inplace_memcpy", "rmo.mo.mutable.load", "apply_packed_bitmask")
    assert waits[:2] == [payload, scratch]
    assert copies == [scratch, pinned, waited]
    assert loads == [scratch, copied]


def test_masks_do_not_come_late_unless_they_are_to(built: Built) -> None:
    for graph in ("unified", "alone"):
        kernels = [kernel for *_, kernel, _ in built.graphs[graph]["masks"] if kernel]
        assert kernels == ["apply_packed_bitmask"]


def test_all_weights_of_the_checkpoint_are_loaded(built: Built, folder: Path) -> None:
    graphs = built.graphs
    expected = {}
    for name, tensor in load_file(folder / "model.safetensors").items():
        own = name.removeprefix("model.")
        draft = own.removeprefix(f"layers.{LAYERS}.")
        if draft in COPIES and draft != own:
            continue
        if draft == own:
            loaded = f"target.{own}"
        elif draft.startswith(("enorm", "hnorm", "eh_proj")):
            loaded = f"draft.{draft}"
        else:
            loaded = f"draft.{draft}".replace("shared_head.", "")
            loaded = loaded if "shared_head" in draft else f"draft.layer.{draft}"
        router = ".gate." in name
        expected[loaded] = ["float32" if router else "bfloat16", list(tensor.shape)]
    assert graphs["weights"] == expected


def test_every_device_has_its_part(built: Built) -> None:
    """Of all layers, or of the experts, beside which each device has the shared one."""
    count, spread, graphs = built
    parts = 1 if spread else count
    heads, inner, hidden = SHAPE["heads"] // parts, 32 // parts, 64
    experts = 8 // count + 1 if spread else 8
    assert graphs["shards"] == {
        name: [shape] * count
        for name, shape in {
            "query": [heads * 192, 24],
            "kv_b_proj": [heads * 256, 512],
            "kv_a_proj_with_mqa": [576, hidden],
            "o_proj": [hidden, heads * 128],
            "gate": [8, hidden],
            "gate_up_proj": [experts, 2 * inner, hidden],
            "down_proj": [experts, hidden, inner],
            "shared up_proj": [inner, hidden],
        }.items()
    }


def test_scores_are_scaled_as_the_configuration_says(built: Built, folder: Path) -> None:
    """MAX's own rope would scale by `mscale`, the checkpoint means `mscale_all_dim`."""
    assert built.graphs["scale"] == pytest.approx(on_gpus(folder).softmax_scale, rel=1e-12)


def test_a_tied_head_and_queries_without_latent(tmp_path: Path) -> None:
    """On two GPUs, with one group of experts and a plain rope."""
    other = {"q_lora_rank": None, "n_group": 1, "topk_group": 1, "rope": "default"}
    folder = tiny_deepseek(tmp_path, **{**SHAPE, **other})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": True}))
    weights = folder / "model.safetensors"
    save_file({k: v for k, v in load_file(weights).items() if k != "lm_head.weight"}, weights)
    graphs = build(2, folder, "tensor")
    assert not any("lm_head" in name for name in graphs["weights"])
    assert graphs["shards"]["query"] == [[4 * 192, 64]] * 2
    assert graphs["scale"] == pytest.approx(192**-0.5, rel=1e-12)


def on_gpus(folder: Path, count: int = 1, **changes: Any) -> DeepseekV3Config:
    """The configuration as GPUs would have it; its graph cannot be built in this process."""
    config = DeepseekV3Config.initialize(
        EngineConfig(model=str(folder), max_length=64).pipeline_config()
    )
    return replace(config, devices=GPUS[:count], **changes)


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


def test_float8_is_what_torch_reads(fp8_folder: Path) -> None:
    name = "model.layers.0.self_attn.o_proj.weight"
    codes = read_tensors([fp8_folder / "model.safetensors"])[name]
    expected = load_torch(fp8_folder / "model.safetensors")[name]
    loaded = cast_stack({name: codes}, DType.bfloat16)[name]
    assert isinstance(loaded, WeightData)
    assert loaded.dtype == DType.float8_e4m3fn
    read = loaded.to_buffer().view(DType.uint8, codes.shape).to_numpy()
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
        ({}, (64, 128), 1, False, r"blocks are \(64, 128\)"),
        ({}, None, 1, False, "blocks are None"),
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
    """Where it is possible, if nothing else is asked for."""
    hf: Any = SimpleNamespace(
        **{
            "hidden_size": 128,
            "q_lora_rank": 128,
            "num_attention_heads": 8,
            "qk_nope_head_dim": 128,
            "qk_rope_head_dim": 64,
            "v_head_dim": 128,
            "intermediate_size": 256,
            "moe_intermediate_size": 256,
            "num_hidden_layers": 3,
            **changes,
        }
    )
    architecture = "sm_90a"
    monkeypatch.setattr(fp8, "accelerator_api", lambda: "cuda")
    monkeypatch.setattr(fp8, "accelerator_architecture_name", lambda: architecture)

    def found(asked: str | None, devices: list[DeviceRef]) -> QuantConfig | None:
        return block_scaled(hf, block, devices, asked, "tiny", spread=spread)

    gpus = GPUS[:count]
    assert (found(None, gpus) is None) is (obstacle is not None)
    assert found("bfloat16", gpus) is None
    assert found(None, [CPU]) is None
    if obstacle is not None:
        with pytest.raises(InputError, match=f"'float8_e4m3fn' of tiny .*{obstacle}.* 'bfloat16'"):
            found("float8_e4m3fn", gpus)
    with pytest.raises(InputError, match="the device has no kernels"):
        found("float8_e4m3fn", [CPU])
    architecture = "sm_80"
    assert found(None, gpus) is None
    with pytest.raises(InputError, match="the device has no kernels"):
        found("float8_e4m3fn", gpus)


def test_max_may_choose_fp8() -> None:
    assert "float8_e4m3fn" in ARCHITECTURE.supported_encodings
    assert SPECULATOR.base is ARCHITECTURE


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
    with pytest.raises(InputError, match=message + ".*use quantization encoding 'bfloat16'"):
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


@pytest.mark.parametrize(
    ("replicas", "expanded", "splits"),
    [([[9, 127]], [384, 384], [0, 2]), ([[9], [127]], [128, 256], [0, 1, 2])],
)
def test_a_prefill_expands_whole_pages_of_every_row(
    replicas: list[list[int]], expanded: list[int], splits: list[int]
) -> None:
    """Two rows of 9 tokens and of 127 with two drafts, on two devices."""
    batches = [rows(*lengths) for lengths in replicas]
    model: Any = SimpleNamespace(
        kv_params=SimpleNamespace(page_size=128),
        devices=[None, None],
        signal_buffers=["s", "t"],
        _ep_inputs=("e",),
    )
    fields = DeepseekV3Model.more_fields(model, batches, 2)
    lengths = [buffer.to_numpy().tolist() for buffer in fields["batch_context_lengths"]]
    assert lengths == [[tokens] for tokens in expanded]
    assert fields["signal_buffers"] == ["s", "t"]
    assert fields["ep_inputs"] == ("e",)
    assert fields["host_input_row_offsets"].to_numpy().tolist() == [0, 9, 136]
    assert fields["data_parallel_splits"].to_numpy().tolist() == splits


def test_a_gpu_is_not_given_rows_of_unknown_lengths() -> None:
    model: Any = SimpleNamespace(devices=[SimpleNamespace(is_host=False)])
    unread: Any = None
    with pytest.raises(InputError, match="use prepare_initial_token_inputs"):
        DeepseekV3Model.prepare_next_token_inputs(model, unread, unread)


def test_one_device_has_no_signals() -> None:
    for device in (CPU, GPUS[0]):
        types = distributed_types([device])
        assert types["signal_buffers"] == types["ep_inputs"] == []
        assert len(types["batch_context_lengths"]) == 1


@pytest.mark.parametrize(
    ("devices", "message"),
    [
        ([CPU, GPUS[0]], r"cpu:0, gpu:0 together; use one CPU, or GPUs only"),
        ([CPU, CPU], r"cpu:0, cpu:0 together"),
        ([DeviceRef.GPU(index) for index in range(9)], r"9 GPUs; use at most 8"),
    ],
)
def test_sets_of_devices_that_are_refused(devices: list[DeviceRef], message: str) -> None:
    with pytest.raises(InputError, match=message):
        check_placement(devices)


@pytest.mark.parametrize("devices", [[GPUS[0]], [CPU, CPU]])
def test_a_model_that_runs_on_one_cpu_says_so(devices: list[DeviceRef]) -> None:
    with pytest.raises(InputError, match=r"Kimi K2\.5 does not run on .*; use one CPU"):
        check_one_cpu(devices, "Kimi K2.5")
    check_one_cpu([CPU], "Kimi K2.5")


@pytest.mark.parametrize(
    ("count", "changes", "message"),
    [
        (1, {"dtype": DType.float32}, r"'float32' of tiny does not run on gpu:0; use 'bfloat16'"),
        (1, {"kv_lora_rank": 256}, r"kv_lora_rank 256 .* kernels need 512; use one CPU"),
        (1, {"v_head_dim": 64}, r"v_head_dim 64 .* kernels need 128"),
        (1, {"n_group": 1, "norm_topk_prob": False}, r"norm_topk_prob False .* n_group 1"),
        (3, {}, r"num_attention_heads 8 of tiny cannot be shared equally by 3 GPUs"),
        (8, {"moe_intermediate_size": 36}, r"moe_intermediate_size 36 .* by 8 GPUs"),
        (2, {"vocab_size": 255}, r"vocab_size 255 .* by 2 GPUs"),
    ],
)
def test_what_gpus_do_not_take_is_refused(
    count: int, changes: dict[str, Any], message: str
) -> None:
    hf: dict[str, Any] = {
        "kv_lora_rank": 512,
        "qk_nope_head_dim": 128,
        "qk_rope_head_dim": 64,
        "v_head_dim": 128,
        "n_group": 2,
        "norm_topk_prob": True,
        "num_attention_heads": 8,
        "intermediate_size": 128,
        "moe_intermediate_size": 32,
        "vocab_size": 256,
    }
    check_gpus(SimpleNamespace(**hf), DType.bfloat16, GPUS, "tiny")
    dtype = changes.pop("dtype", DType.bfloat16)
    changed = SimpleNamespace(**{**hf, **changes})
    check_gpus(changed, dtype, [CPU], "tiny")
    with pytest.raises(InputError, match=message):
        check_gpus(changed, dtype, GPUS[:count], "tiny")


def asked(
    devices: list[DeviceRef], replicas: int, spread: int, shared_experts: int = 1, **changes: Any
) -> bool:
    hf = SimpleNamespace(n_shared_experts=shared_experts)
    runtime = {
        "ep_size": spread,
        "ep_use_allreduce": False,
        "eplb_redundant_experts_per_gpu": 0,
        "max_batch_size": 4,
        **changes,
    }
    pipeline: Any = SimpleNamespace(runtime=SimpleNamespace(**runtime))
    model: Any = SimpleNamespace(data_parallel_degree=replicas)
    return spread_over(pipeline, model, hf, devices)


def test_gpus_share_all_layers_or_spread_the_experts() -> None:
    assert not asked([CPU], 1, 1)
    assert not asked(GPUS[:2], 1, 1)
    assert asked(GPUS[:2], 2, 2)


@pytest.mark.parametrize(("batch", "tokens"), [(4, 100 + 3 * 4), (200, 200 + 3 * 200)])
def test_room_for_what_gpus_send_to_each_others_experts(batch: int, tokens: int) -> None:
    """New tokens, and three drafts of every row."""
    hf = SimpleNamespace(hidden_size=64, num_experts_per_tok=2, n_routed_experts=8)
    pipeline: Any = SimpleNamespace(
        runtime=SimpleNamespace(max_batch_input_tokens=100, max_batch_size=batch),
        speculative=SimpleNamespace(num_speculative_tokens=3),
    )
    ep = expert_parallelism(hf, pipeline, GPUS[:2], None)
    assert (ep.n_experts, ep.top_k, ep.hidden_size, ep.n_gpus_per_node) == (8, 2, 64, 2)
    assert ep.max_tokens_per_rank == tokens
    assert ep.dispatch_dtype == DType.bfloat16
    blocks = QuantConfig.blockscaled_fp8(mlp_quantized_layers=[], attn_quantized_layers=[])
    ep = expert_parallelism(hf, pipeline, GPUS[:2], blocks)
    assert ep.dispatch_dtype == DType.float8_e4m3fn


@pytest.mark.parametrize(
    ("devices", "replicas", "spread", "message"),
    [
        (GPUS[:2], 2, 1, "data_parallel_degree 2 with ep_size 1 does not run on gpu:0, gpu:1"),
        (GPUS[:2], 1, 2, "data_parallel_degree 1 with ep_size 2 .* both the number of GPUs"),
        (GPUS, 4, 4, "data_parallel_degree 4 with ep_size 4"),
        ([CPU, CPU], 2, 2, "does not run on cpu:0, cpu:0"),
        (GPUS[2:4], 2, 2, "expert parallelism does not run on gpu:2, gpu:3; give all GPUs from"),
        (GPUS[1::-1], 2, 2, "gpu:1, gpu:0; .* in their order"),
    ],
)
def test_other_ways_to_share_a_stack_are_refused(
    devices: list[DeviceRef], replicas: int, spread: int, message: str
) -> None:
    with pytest.raises(InputError, match=message):
        asked(devices, replicas, spread)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"max_batch_size": None}, "max_batch_size is not set, .*; set it"),
        ({"ep_use_allreduce": True}, "ep_use_allreduce is True .*; leave them out"),
        ({"eplb_redundant_experts_per_gpu": 1}, "eplb_redundant_experts_per_gpu 1, .* not supp"),
    ],
)
def test_settings_that_expert_parallelism_does_not_go_with(
    changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        asked(GPUS[:2], 2, 2, **changes)
    assert not asked(GPUS[:2], 1, 1, max_batch_size=None)


class Replicated(DeepseekV3Model):
    """Two replicas without a graph, with two drafts and room for 9 tokens each."""

    def __init__(self) -> None:
        self.kv_params = SimpleNamespace(data_parallel_degree=2, page_size=128)
        self.devices: Any = [SimpleNamespace(is_host=False)] * 2
        self.signal_buffers: Any = ["s", "t"]
        self._connected: Any = SimpleNamespace(config=SimpleNamespace(max_tokens_per_rank=9))
        self.seen: list[TextContext] = []
        drafts = Buffer.from_numpy(np.full((3, 2), -1))
        names = ("tokens", "input_row_offsets", "return_n_logits", "draft_tokens")

        def fields(contexts: list[TextContext]) -> dict[str, Buffer]:
            self.seen = contexts
            return dict.fromkeys(names, drafts)

        self.batch: Any = SimpleNamespace(fields=fields)


def rows(*lengths: int) -> list[TextContext]:
    return [
        TextContext(max_length=512, tokens=TokenBuffer(np.arange(length, dtype=np.int64)))
        for length in lengths
    ]


def test_batches_of_replicas_become_one() -> None:
    model = Replicated()
    batches = [rows(3, 1), rows(7)]
    inputs = model.prepare_initial_token_inputs(batches)
    assert isinstance(inputs, DeepseekV3Inputs)
    assert [id(context) for context in model.seen] == [id(c) for batch in batches for c in batch]
    assert inputs.data_parallel_splits.to_numpy().tolist() == [0, 2, 3]
    assert inputs.host_input_row_offsets.to_numpy().tolist() == [0, 3, 4, 11]


class Answering(Replicated):
    """Its graph's outputs are given beforehand, a step's rows one after the other."""

    def __init__(self, *steps: tuple[list[int], list[int], list[list[int]]]) -> None:
        super().__init__()
        self._connected = None
        self._steps = iter(steps)
        self.inputs: list[DeepseekV3Inputs] = []
        self.batch = BatchBuilder(
            max_batch_size=4,
            max_batch_input_tokens=32,
            vocab_size=64,
            num_speculative_tokens=2,
            device=CPUDevice(),
        )

    def execute(self, model_inputs: Any) -> UnifiedEagleOutputs:
        self.inputs.append(model_inputs)
        outputs = [Buffer.from_numpy(np.array(values)) for values in next(self._steps)]
        return UnifiedEagleOutputs(
            num_accepted_draft_tokens=outputs[0],
            next_tokens=outputs[1],
            next_draft_tokens=outputs[2],
        )


def test_a_step_of_two_replicas_moves_each_row_on_by_its_own_tokens() -> None:
    model = Answering(
        ([0, 0, 0], [10, 20, 30], [[11, 12], [21, 22], [31, 32]]),
        ([2, 1], [23, 40], [[24, 25], [41, 42]]),
    )
    asked: list[Any] = []
    manager: Any = SimpleNamespace(runtime_inputs=asked.append, step=lambda context: None)
    pipeline = SpeculativePipeline(model, manager)
    first, second, third = rows(3, 1, 7)

    new = pipeline.execute(TextGenerationInputs(batches=[[first, second], [third]]))
    assert [new[one.request_id].tokens for one in (first, second, third)] == [[10], [20], [30]]
    pipeline.release(first.request_id)
    new = pipeline.execute(TextGenerationInputs(batches=[[second], [third]]))
    assert new[second.request_id].tokens == [21, 22, 23]
    assert new[third.request_id].tokens == [31, 40]

    assert asked == [[[first, second], [third]], [[second], [third]]]
    last = model.inputs[1]
    assert last.tokens.to_numpy().tolist() == [20, 30]
    assert last.draft_tokens is not None
    assert last.draft_tokens.to_numpy().tolist() == [[21, 22], [31, 32]]
    assert last.data_parallel_splits.to_numpy().tolist() == [0, 1, 2]
    assert model.batch.row(third).drafts == [41, 42]


def test_a_wrong_number_of_replicas_is_refused() -> None:
    message = "batches of 1 replicas were given; this graph has 2: give one for each"
    with pytest.raises(InputError, match=message):
        Replicated().prepare_initial_token_inputs([rows(3, 1, 7)])


def test_a_replica_gets_no_more_tokens_than_there_is_room_for() -> None:
    with pytest.raises(InputError, match=r"batch of replica 1 has 10 tokens, .* room for 9: give"):
        Replicated().prepare_initial_token_inputs([rows(3, 1), rows(8)])


def test_a_part_of_the_shared_experts_is_refused() -> None:
    with pytest.raises(InputError, match=r"n_shared_experts is 2, .* make .* ep_size 1"):
        asked(GPUS[:2], 2, 2, shared_experts=2)


@pytest.mark.parametrize(("name", "value"), [("n_routed_experts", 8), ("vocab_size", 256)])
def test_experts_that_gpus_cannot_share_equally_are_refused(name: str, value: int) -> None:
    """By tensor parallelism, 3 GPUs could not share 8 heads either."""
    hf: Any = SimpleNamespace(
        kv_lora_rank=512,
        qk_nope_head_dim=128,
        qk_rope_head_dim=64,
        v_head_dim=128,
        n_group=2,
        n_routed_experts=9,
        vocab_size=258,
        num_attention_heads=8,
    )
    check_gpus(hf, DType.bfloat16, GPUS[:3], "tiny", spread=True)
    setattr(hf, name, value)
    with pytest.raises(InputError, match=f"{name} {value} of tiny cannot be shared equally by 3"):
        check_gpus(hf, DType.bfloat16, GPUS[:3], "tiny", spread=True)
