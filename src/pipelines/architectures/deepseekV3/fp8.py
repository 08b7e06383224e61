"""FP8 checkpoints on GPUs: computed with as they are where the kernels can, else dequantised."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

import numpy as np
from max.driver import Buffer, accelerator_api, accelerator_architecture_name
from max.dtype import DType
from max.graph import DeviceRef, Shape
from max.graph.weights import WeightData
from max.nn.quant_config import QuantConfig

from unispec.checkpoints import Tensor

__all__ = ["as_float8", "block_scaled", "with_scales"]

_BLOCK: Final = 128
"""Rows and columns of a block that MAX's kernels take, those of DeepSeek-V3."""
_FIRST_WITH_FP8: Final = 90
"""Hopper, the first architecture for which max 26.7 has grouped products in FP8."""


def block_scaled(
    hf: Any, block: tuple[int, int] | None, devices: Sequence[DeviceRef], *, spread: bool
) -> QuantConfig | None:
    """How the layers compute in FP8; None where they do not.

    Args:
        hf: a Hugging Face config that `check_stack` has passed.
        block: rows and columns of the checkpoint's blocks; None: it is not in FP8.
        devices: where it is to run.
        spread: whether they have some of the experts each, and attention whole.

    Returns:
        None on a CPU or a GPU without FP8, for another block, for queries without latent, which
        MAX's FP8 attention does not know, and where a matrix, or what a device has of it, is
        not of whole blocks.
    """
    if devices[0].is_cpu() or block != (_BLOCK, _BLOCK) or hf.q_lora_rank is None:
        return None
    if not _have_fp8():
        return None
    parts = 1 if spread else len(devices)
    shared = (
        hf.num_attention_heads * (hf.qk_nope_head_dim + hf.qk_rope_head_dim),
        hf.num_attention_heads * hf.v_head_dim,
        hf.intermediate_size,
        hf.moe_intermediate_size,
    )
    if any(size % _BLOCK for size in (hf.hidden_size, hf.q_lora_rank)):
        return None
    if any(size % (parts * _BLOCK) for size in shared):
        return None
    # The layer of multi-token prediction comes after the last one.
    layers = range(hf.num_hidden_layers + 1)
    return QuantConfig.blockscaled_fp8(mlp_quantized_layers=layers, attn_quantized_layers=layers)


def with_scales(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    """The shapes of a layer's tensors and of its matrices' scales, but for the router.

    Args:
        shapes: of the tensors by name.
    """
    scaled = dict(shapes)
    for name, shape in shapes.items():
        if len(shape) == 2 and not name.endswith(".gate.weight"):
            scaled[name + "_scale"] = tuple(-(-size // _BLOCK) for size in shape)
    return scaled


def as_float8(tensor: Tensor, name: str) -> WeightData:
    """A matrix of float8 e4m3 for the graph.

    Args:
        tensor: its bytes, uint8.
        name: the weight's.
    """
    data = Buffer.from_numpy(np.ascontiguousarray(tensor)).view(DType.float8_e4m3fn, tensor.shape)
    return WeightData(data, name, DType.float8_e4m3fn, Shape(tensor.shape))


def _have_fp8() -> bool:
    if accelerator_api() != "cuda":
        return False
    number = "".join(filter(str.isdigit, accelerator_architecture_name()))  # of sm_90a: 90
    return bool(number) and int(number) >= _FIRST_WITH_FP8
