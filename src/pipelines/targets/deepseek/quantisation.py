"""How a checkpoint is quantised, as its config.json states it."""

from __future__ import annotations

from typing import Any, Final

from unispec.checkpoints.quantisation import check_plain, stated_quantisation
from unispec.errors import InputError
from unispec.pipelines.layers.fields import positive_integer

__all__ = ["USE_QUANTISED", "read_fp8_block", "read_int4_group_size"]

USE_QUANTISED: Final = "use a checkpoint in fp8 blocks or packed int4, or one that is not quantised"
"""What to do where a checkpoint is quantised in another way."""

_PACKED: Final = "compressed-tensors"
_PACKED_ONLY: Final = {
    "format": "pack-quantized",
    "input_activations": None,
    "num_bits": 4,
    "type": "int",
    "symmetric": True,
    "strategy": "group",
}


def read_fp8_block(hf: Any, source: str) -> tuple[int, int] | None:
    """Rows and columns of an FP8 checkpoint's blocks; None if it is packed or not quantised.

    Raises:
        InputError: another quantisation.
    """
    quantisation = stated_quantisation(hf)
    if not quantisation or quantisation.get("quant_method") == _PACKED:
        return None
    block: Any = quantisation.get("weight_block_size")
    is_pair = isinstance(block, list | tuple) and len(block) == 2
    in_blocks = is_pair and all(isinstance(size, int) and size > 0 for size in block)
    if quantisation.get("quant_method") != "fp8" or not in_blocks:
        check_plain(hf, source, use=USE_QUANTISED)
    return int(block[0]), int(block[1])


def read_int4_group_size(hf: Any, source: str) -> int | None:
    """Columns of a packed int4 checkpoint's groups; None if it is in FP8 or not quantised.

    `ignore` is not read: which matrices are packed is told by the names of the tensors.

    Raises:
        InputError: more than one scheme, or one that is not symmetric int4 in groups.
    """
    quantisation = stated_quantisation(hf)
    if quantisation.get("quant_method") != _PACKED:
        return None
    groups = quantisation.get("config_groups")
    schemes = list(groups.values()) if isinstance(groups, dict) else []
    if len(schemes) != 1 or not isinstance(schemes[0], dict):
        raise InputError(
            f"config_groups {groups!r} in quantization_config of {source} is not one scheme for"
            f" all packed matrices; {USE_QUANTISED}"
        )
    (scheme,) = schemes
    weights = scheme.get("weights")
    if not isinstance(weights, dict):
        raise InputError(
            f"weights {weights!r} in quantization_config of {source} is no scheme; {USE_QUANTISED}"
        )
    found = {
        "format": scheme.get("format") or quantisation.get("format"),
        "input_activations": scheme.get("input_activations"),
        # What compressed-tensors assumes of a scheme with groups.
        "type": "int",
        "symmetric": True,
        "strategy": "group",
        **weights,
    }
    for name, supported in _PACKED_ONLY.items():
        if found.get(name) != supported:
            raise InputError(
                f"{name} {found.get(name)!r} in quantization_config of {source} is not"
                f" {supported!r}; {USE_QUANTISED}"
            )
    size = weights.get("group_size")
    return positive_integer("group_size", size, f"quantization_config of {source}")
