"""Whether weights and cache fit a GPU, asked before any of them is read."""

from __future__ import annotations

from typing import Any

from max.driver import Device, is_virtual_device_mode
from max.pipelines.lib import PipelineConfig

from unispec.errors import InputError
from unispec.pipelines.runtime.weights import weight_bytes
from unispec.pipelines.served.memory import ServedMemoryPlanner

__all__ = ["check_device_memory"]


def check_device_memory(
    pipeline_config: PipelineConfig, config: Any, *, cache: int, device: Device
) -> None:
    """Refuses what a GPU cannot hold; a virtual one has no memory to ask for.

    Args:
        config: of the graph, as `weight_bytes` takes it.
        cache: bytes of all pages.

    Raises:
        InputError: weights, cache and what a step is given need more than the device has free.
    """
    if device.is_host or is_virtual_device_mode():
        return
    weights, free = weight_bytes(pipeline_config, config), int(device.stats["free_memory"])
    hf = pipeline_config.model.huggingface_config
    inputs = ServedMemoryPlanner(config).estimate_activation_memory(pipeline_config, hf)
    if weights + cache + inputs > free:
        raise InputError(
            f"{pipeline_config.model.model_name} needs {weights / 1e9:.1f} GB for its weights,"
            f" {cache / 1e9:.1f} GB for the cache and {inputs / 1e9:.1f} GB for what a step is"
            f" given, and {device.label}:{device.id} has"
            f" {free / 1e9:.1f} GB free: use a GPU with more memory, a smaller model"
            + (", or fewer pages (kv_cache_pages)" if weights < free else "")
        )
