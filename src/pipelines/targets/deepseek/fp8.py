"""FP8 checkpoints on GPUs: computed with in FP8 where the kernels can, else dequantised."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

from max.driver import accelerator_api, accelerator_architecture_name
from max.graph import DeviceRef
from max.nn.quant_config import QuantConfig

from unispec.checkpoints import Tensor
from unispec.errors import InputError

__all__ = ["as_stored", "block_scaled", "fp8_obstacle", "with_scales"]

_SCALE: Final = "_scale_inv"
_PLAIN: Final = (".gate.weight", "eh_proj.weight", "embed_tokens.weight", "head.weight")
"""Matrices among the layers that are not in FP8."""
_BLOCK: Final = 128
"""Rows and columns of a block that MAX's kernels take, those of DeepSeek-V3."""
_FIRST_WITH_FP8: Final = 90
"""Hopper, the first architecture for which max 26.7 has grouped products in FP8."""


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
        expected = tensor.ndim == 2 and ".layers." in f".{name}" and not name.endswith(_PLAIN)
        if not name.endswith(_SCALE) and expected != (name + _SCALE in tensors):
            found = "has no scales" if expected else "has scales"
            raise InputError(
                f"{source}: {name!r} {found}, but FP8 layers take all matrices of attention and"
                " experts in FP8 and no others; use quantization encoding 'bfloat16'"
            )
    return {name.replace(_SCALE, "_scale"): tensor for name, tensor in tensors.items()}


def with_scales(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    """The shapes of a layer's tensors and of its matrices' scales, but for the router."""
    scaled = dict(shapes)
    for name, shape in shapes.items():
        if len(shape) == 2 and not name.endswith(_PLAIN):
            scaled[name + "_scale"] = tuple(-(-size // _BLOCK) for size in shape)
    return scaled


def fp8_obstacle(
    hf: Any, block: tuple[int, int] | None, devices: Sequence[DeviceRef], *, spread: bool
) -> str | None:
    """Why the layers cannot compute in FP8; None if they can.

    Args:
        block: rows and columns of the checkpoint's blocks; None: it is not in FP8.
    """
    if devices[0].is_cpu() or not _have_fp8():
        return "the device has no kernels for it"
    if block != (_BLOCK, _BLOCK):
        return f"the checkpoint's blocks are {block}, the kernels' are {(_BLOCK, _BLOCK)}"
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
        if size % _BLOCK:
            return f"{name} is {size:g}, no multiple of {_BLOCK}"
    return None


def _have_fp8() -> bool:
    if accelerator_api() != "cuda":
        return False
    number = "".join(filter(str.isdigit, accelerator_architecture_name()))  # of sm_90a: 90
    return bool(number) and int(number) >= _FIRST_WITH_FP8
