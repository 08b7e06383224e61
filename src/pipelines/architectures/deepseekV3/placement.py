"""Refuses devices that a stack cannot run on, by name and value."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

from max.dtype import DType
from max.graph import DeviceRef
from max.pipelines.lib import MAXModelConfig, PipelineConfig

from unispec.errors import InputError

__all__ = ["check_gpus", "check_one_cpu", "check_parallelism", "check_placement"]

_MOST_GPUS: Final = 8
"""As many as MAX's signal buffers have room for."""
_KERNEL_SIZES: Final = {
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
}
_SHARED: Final = ("num_attention_heads", "intermediate_size", "moe_intermediate_size", "vocab_size")


def check_one_cpu(devices: Sequence[DeviceRef], model: str) -> None:
    """Refuses all but one CPU.

    Args:
        devices: where it is to run.
        model: what to call it in errors.

    Raises:
        InputError: a GPU, or several devices.
    """
    if len(devices) != 1 or not devices[0].is_cpu():
        raise InputError(
            f"{model} does not run on {_named(devices)} here; use one CPU, or MAX's own"
            " architecture"
        )


def check_placement(devices: Sequence[DeviceRef]) -> None:
    """Refuses sets of devices that do not run one stack together.

    Args:
        devices: where it is to run.

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


def check_gpus(hf: Any, dtype: DType, devices: Sequence[DeviceRef], source: str) -> None:
    """Refuses what MAX's layers for GPUs do not take; a CPU takes everything.

    Args:
        hf: a Hugging Face config that `check_stack` has passed.
        dtype: of weights and activations.
        devices: where it is to run.
        source: the file or folder, for the errors.

    Raises:
        InputError: another dtype than bfloat16, other widths of attention than DeepSeek-V3's,
            weights of experts that are not normalised though there is one group, or a size
            that the devices cannot share equally.
    """
    if devices[0].is_cpu():
        return
    if dtype != DType.bfloat16:
        raise InputError(
            f"quantization encoding {dtype.name!r} of {source} does not run on"
            f" {_named(devices)}; use 'bfloat16', or one CPU"
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
    for name in _SHARED:
        if getattr(hf, name) % len(devices):
            raise InputError(
                f"{name} {getattr(hf, name)} of {source} cannot be shared equally by"
                f" {len(devices)} GPUs; use a number of them that divides it"
            )


def check_parallelism(pipeline_config: PipelineConfig, model_config: MAXModelConfig) -> None:
    """Refuses to share a stack in another way than by tensor parallelism.

    Args:
        pipeline_config: for `ep_size`.
        model_config: for `data_parallel_degree`.

    Raises:
        InputError: data-parallel attention or expert parallelism is asked for.
    """
    asked = {
        "data_parallel_degree": model_config.data_parallel_degree,
        "ep_size": pipeline_config.runtime.ep_size,
    }
    for name, value in asked.items():
        if value > 1:
            raise InputError(
                f"{name} is {value}, but DeepSeek-V3 is shared by tensor parallelism only here;"
                " leave it 1, or use MAX's own architecture"
            )


def _named(devices: Sequence[DeviceRef]) -> str:
    return ", ".join(str(device) for device in devices)
