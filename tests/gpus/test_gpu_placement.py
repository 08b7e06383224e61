"""Which devices DeepSeek-V3 runs on, and how they share its layers and experts."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from deepseek_gpus import CPU, GPUS
from max.dtype import DType
from max.graph import DeviceRef
from max.nn.quant_config import QuantConfig

from unispec.errors import InputError
from unispec.pipelines.targets.deepseek import fp8
from unispec.pipelines.targets.deepseek.placement import (
    check_gpus,
    check_one_device,
    check_placement,
    expert_parallelism,
    spread_over,
)

HF: dict[str, Any] = {
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
"""What GPUs take."""


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


def test_a_model_that_runs_on_one_device_says_so() -> None:
    message = r"Kimi K2\.5 does not run on gpu:0, gpu:1 together; use one of them"
    with pytest.raises(InputError, match=message):
        check_one_device(GPUS[:2], "Kimi K2.5")
    check_one_device([CPU], "Kimi K2.5")
    check_one_device(GPUS[:1], "Kimi K2.5")


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
    check_gpus(SimpleNamespace(**HF), DType.bfloat16, GPUS, "tiny")
    dtype = changes.pop("dtype", DType.bfloat16)
    changed = SimpleNamespace(**{**HF, **changes})
    check_gpus(changed, dtype, [CPU], "tiny")
    with pytest.raises(InputError, match=message):
        check_gpus(changed, dtype, GPUS[:count], "tiny")


@pytest.mark.parametrize("dtype", [DType.bfloat16, DType.float32])
def test_experts_on_hopper_need_fp8(monkeypatch: pytest.MonkeyPatch, dtype: DType) -> None:
    hf = SimpleNamespace(**HF)
    monkeypatch.setattr(fp8, "accelerator_api", lambda: "cuda")
    monkeypatch.setattr(fp8, "accelerator_architecture_name", lambda: "sm_90a")
    message = f"{dtype.name!r} of tiny does not run on gpu:0; use 'float8_e4m3fn', to which"
    with pytest.raises(InputError, match=message):
        check_gpus(hf, dtype, GPUS[:1], "tiny")
    check_gpus(hf, DType.bfloat16, GPUS[:1], "tiny", in_fp8=True)
    check_gpus(hf, dtype, [CPU], "tiny")
    monkeypatch.setattr(fp8, "accelerator_architecture_name", lambda: "sm_100a")
    check_gpus(hf, DType.bfloat16, GPUS[:1], "tiny")


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
