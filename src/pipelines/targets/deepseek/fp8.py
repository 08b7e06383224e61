"""FP8 on GPUs: what is stored in the kernels' blocks is computed with so, all else is rounded."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

import numpy as np
from max.driver import accelerator_api, accelerator_architecture_name
from max.graph import DeviceRef
from max.nn.quant_config import QuantConfig

from unispec.checkpoints import Tensor
from unispec.checkpoints.block_fp8 import SCALE, quantise_blocks
from unispec.errors import InputError

__all__ = [
    "BLOCK",
    "as_stored",
    "block_scaled",
    "experts_need_fp8",
    "fp8_obstacle",
    "is_quantised",
    "rounded",
    "with_scales",
]

_LAYER_SCALE: Final = "_scale"
_PLAIN: Final = (".gate.weight", "eh_proj.weight", "embed_tokens.weight", "head.weight")
"""Matrices among the layers that are not in FP8."""
_SIDE: Final = 128
BLOCK: Final = (_SIDE, _SIDE)
"""Rows and columns of a block that MAX's kernels take, those of DeepSeek-V3."""
_FIRST_WITH_FP8: Final = 90
"""Hopper, the first architecture for which max 26.7 has grouped products in FP8; in bfloat16 it
has none that compile there."""


def block_scaled(hf: Any) -> QuantConfig:
    """How the layers compute in FP8, activations too.

    Args:
        hf: a Hugging Face config with nothing that `fp8_obstacle` names.
    """
    # The layer of multi-token prediction comes after the last one.
    layers = range(hf.num_hidden_layers + 1)
    return QuantConfig.blockscaled_fp8(mlp_quantized_layers=layers, attn_quantized_layers=layers)


def as_stored(tensors: Mapping[str, Tensor], *, source: str) -> dict[str, Tensor]:
    """The tensors, scales under the names that the layers give them.

    Raises:
        InputError: a matrix of a layer is not in FP8, or one that is no layer's is.
    """
    for name, tensor in tensors.items():
        expected = is_quantised(name, tensor.ndim)
        if not name.endswith(SCALE) and expected != (name + SCALE in tensors):
            found = "has no scales" if expected else "has scales"
            raise InputError(
                f"{source}: {name!r} {found}, but FP8 layers take all matrices of attention and"
                " experts in FP8 and no others; use a checkpoint that has them so, or quantization"
                " encoding 'bfloat16' where the GPU has it"
            )
    return {name.replace(SCALE, _LAYER_SCALE): tensor for name, tensor in tensors.items()}


def rounded(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of a checkpoint that is not in FP8, matrices of layers rounded to FP8 blocks."""
    stored: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if is_quantised(name, tensor.ndim) and np.issubdtype(tensor.dtype, np.floating):
            stored[name], stored[name + _LAYER_SCALE] = quantise_blocks(tensor, BLOCK)
        else:
            stored[name] = tensor
    return stored


def with_scales(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    """The shapes of a layer's tensors and of its matrices' scales, but for the router."""
    scaled = dict(shapes)
    for name, shape in shapes.items():
        if is_quantised(name, len(shape)):
            scaled[name + _LAYER_SCALE] = tuple(-(-size // _SIDE) for size in shape)
    return scaled


def is_quantised(name: str, dims: int) -> bool:
    """Whether FP8 layers have the tensor of this name, with so many dimensions, in FP8."""
    return dims == 2 and ".layers." in f".{name}" and not name.endswith(_PLAIN)


def fp8_obstacle(hf: Any, devices: Sequence[DeviceRef], *, spread: bool) -> str | None:
    """Why the layers cannot compute in FP8; None if they can."""
    if devices[0].is_cpu() or _cuda_architecture() < _FIRST_WITH_FP8:
        return "the device has no kernels for it"
    if hf.q_lora_rank is None:
        return "q_lora_rank is not set"
    query = hf.qk_nope_head_dim + hf.qk_rope_head_dim
    shares = 1 if spread else len(devices)
    sizes = {
        "hidden_size": hf.hidden_size,
        "q_lora_rank": hf.q_lora_rank,
        "the width of a device's queries": hf.num_attention_heads * query / shares,
        "the width of a device's values": hf.num_attention_heads * hf.v_head_dim / shares,
        "a device's part of intermediate_size": hf.intermediate_size / shares,
        "a device's part of moe_intermediate_size": hf.moe_intermediate_size / shares,
    }
    for name, size in sizes.items():
        if size % _SIDE:
            return f"{name} is {size:g}, no multiple of {_SIDE}"
    return None


def experts_need_fp8(devices: Sequence[DeviceRef]) -> bool:
    """Whether max 26.7 has no product of experts in bfloat16 that compiles for the devices."""
    return not devices[0].is_cpu() and _cuda_architecture() == _FIRST_WITH_FP8


def _cuda_architecture() -> int:
    """Of sm_90a: 90; 0 of another maker's."""
    if accelerator_api() != "cuda":
        return 0
    return int("".join(filter(str.isdigit, accelerator_architecture_name())) or 0)
