"""Refuses devices that a stack cannot run on, by name and value.

`hf` has passed `check_stack`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

from max.dtype import DType
from max.graph import DeviceRef
from max.nn.comm.ep import EPConfig
from max.nn.quant_config import QuantConfig
from max.pipelines.lib import MAXModelConfig, PipelineConfig

from unispec.errors import InputError

from .fp8 import experts_need_fp8

__all__ = [
    "check_gpus",
    "check_one_device",
    "check_placement",
    "expert_parallelism",
    "spread_over",
]

_MOST_GPUS: Final = 8
"""As many as MAX's signal buffers have room for."""
_KERNEL_SIZES: Final = {
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
}
_SHARED: Final = ("num_attention_heads", "intermediate_size", "moe_intermediate_size", "vocab_size")
"""What GPUs share equally by tensor parallelism."""
_SPREAD: Final = ("n_routed_experts", "vocab_size")
"""What they share equally by expert parallelism."""


def check_one_device(devices: Sequence[DeviceRef], model: str) -> None:
    """Refuses all but one device.

    Raises:
        InputError: several devices.
    """
    if len(devices) != 1:
        raise InputError(
            f"{model} does not run on {_named(devices)} together; use one of them, or MAX's own"
            " architecture"
        )


def check_placement(devices: Sequence[DeviceRef]) -> None:
    """Refuses sets of devices that do not run one stack together.

    Raises:
        InputError: several CPUs, CPUs and GPUs, or more than 8 GPUs.
    """
    cpus = sum(device.is_cpu() for device in devices)
    if cpus and len(devices) > 1:
        raise InputError(
            f"DeepSeek-V3 does not run on {_named(devices)} together; use one CPU, or GPUs only"
        )
    if len(devices) > _MOST_GPUS:
        raise InputError(
            f"DeepSeek-V3 does not run on {len(devices)} GPUs; use at most {_MOST_GPUS}"
        )


def check_gpus(
    hf: Any,
    dtype: DType,
    devices: Sequence[DeviceRef],
    source: str,
    *,
    in_fp8: bool = False,
    spread: bool = False,
) -> None:
    """Refuses what MAX's layers for GPUs do not take; a CPU takes everything.

    Args:
        in_fp8: whether layers compute in FP8, and only what is between them in `dtype`.

    Raises:
        InputError: another dtype than bfloat16, bfloat16 where experts need FP8, other widths of
            attention than DeepSeek-V3's, weights of experts that are not normalised though there
            is one group, or a size that the devices cannot share equally.
    """
    if devices[0].is_cpu():
        return
    in_bfloat16 = dtype == DType.bfloat16 and not in_fp8
    if dtype != DType.bfloat16 or (in_bfloat16 and experts_need_fp8(devices)):
        use = "'float8_e4m3fn', to which other numbers are rounded"
        raise InputError(
            f"quantization encoding {dtype.name!r} of {source} does not run on {_named(devices)};"
            f" use {use if experts_need_fp8(devices) else repr('bfloat16')}, or one CPU"
        )
    for name, supported in _KERNEL_SIZES.items():
        if getattr(hf, name) != supported:
            raise InputError(
                f"{name} {getattr(hf, name)} of {source} does not run on {_named(devices)},"
                f" whose kernels need {supported}; use one CPU"
            )
    if hf.n_group == 1 and not hf.norm_topk_prob:
        raise InputError(
            f"norm_topk_prob {hf.norm_topk_prob!r} of {source} with n_group 1 does not run on"
            f" {_named(devices)}, whose router always normalises one group; use one CPU"
        )
    for name in _SPREAD if spread else _SHARED:
        if getattr(hf, name) % len(devices):
            raise InputError(
                f"{name} {getattr(hf, name)} of {source} cannot be shared equally by"
                f" {len(devices)} GPUs; use a number of them that divides it"
            )


def spread_over(
    pipeline_config: PipelineConfig,
    model_config: MAXModelConfig,
    hf: Any,
    devices: Sequence[DeviceRef],
) -> bool:
    """Whether each GPU has rows of its own, with their attention whole, and some of the experts.

    Args:
        pipeline_config: for `ep_size`.
        model_config: for `data_parallel_degree`.

    Returns:
        False for one device, or for tensor parallelism.

    Raises:
        InputError: only one of the two is asked for, or for other devices than all GPUs in
            order, or settings that go with neither, or the stack has not one shared expert.
    """
    replicas, spread = model_config.data_parallel_degree, pipeline_config.runtime.ep_size
    if replicas == spread == 1:
        return False
    if replicas != spread or replicas != len(devices) or devices[0].is_cpu():
        raise InputError(
            f"data_parallel_degree {replicas} with ep_size {spread} does not run on"
            f" {_named(devices)}; make both 1, for tensor parallelism, or both the number of GPUs"
        )
    if [device.id for device in devices] != list(range(len(devices))):
        raise InputError(
            f"expert parallelism does not run on {_named(devices)}; give all GPUs from gpu:0 on, in"
            " their order"
        )
    runtime = pipeline_config.runtime
    if runtime.ep_use_allreduce or runtime.eplb_redundant_experts_per_gpu:
        raise InputError(
            f"ep_use_allreduce is {runtime.ep_use_allreduce} and eplb_redundant_experts_per_gpu"
            f" {runtime.eplb_redundant_experts_per_gpu}, which are not supported; leave them out"
        )
    if runtime.max_batch_size is None:
        raise InputError(
            "max_batch_size is not set, but expert parallelism makes room for the drafts of so"
            " many rows; set it"
        )
    if hf.n_shared_experts != 1:
        raise InputError(
            f"n_shared_experts is {hf.n_shared_experts}, but expert parallelism runs with one;"
            " make data_parallel_degree and ep_size 1"
        )
    return True


def expert_parallelism(
    hf: Any,
    pipeline_config: PipelineConfig,
    devices: Sequence[DeviceRef],
    fp8: QuantConfig | None,
) -> EPConfig:
    """Sizes of what GPUs send to each other's experts.

    Args:
        hf: a Hugging Face config that `check_gpus` has passed.
        pipeline_config: that `spread_over` has passed, for the batch and K.
        fp8: how the experts compute in FP8; None: in bfloat16.
    """
    runtime, speculative = pipeline_config.runtime, pipeline_config.speculative
    drafts = (speculative.num_speculative_tokens or 0) if speculative else 0
    rows = runtime.max_batch_size or 1
    return EPConfig(
        dispatch_dtype=DType.bfloat16 if fp8 is None else DType.float8_e4m3fn,
        dispatch_quant_config=fp8,
        combine_dtype=DType.bfloat16,
        hidden_size=hf.hidden_size,
        top_k=hf.num_experts_per_tok,
        n_experts=hf.n_routed_experts,
        max_tokens_per_rank=max(runtime.max_batch_input_tokens, rows) + drafts * rows,
        n_gpus_per_node=len(devices),
        n_nodes=1,
        node_id=0,
        # Else MAX runs it in a side stream, which a draft's loop cannot have in max 26.7.
        fused_shared_expert=True,
    )


def _named(devices: Sequence[DeviceRef]) -> str:
    return ", ".join(str(device) for device in devices)
