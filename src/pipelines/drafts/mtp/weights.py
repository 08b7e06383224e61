"""The MTP layer's part of a DeepSeek-V3 checkpoint as the state dictionary of our draft."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Final

from unispec.checkpoints import StoredMatrix, Tensor, Weight
from unispec.checkpoints.stored import as_floats
from unispec.checkpoints.validation import canonical_names, validated_state_dict
from unispec.errors import InputError
from unispec.pipelines.targets.deepseek.config import DeepseekV3Config
from unispec.pipelines.targets.deepseek.layouts import in_layout
from unispec.pipelines.targets.deepseek.quantisation import USE_QUANTISED
from unispec.pipelines.targets.deepseek.weights import Shapes, layer_shapes

__all__ = ["mtp_state_dict"]

_LOGGER: Final = logging.getLogger(__name__)
_COPIES: Final = ("embed_tokens.weight", "shared_head.head.weight")


def mtp_state_dict(
    tensors: Mapping[str, Weight], config: DeepseekV3Config, *, source: str
) -> dict[str, Tensor]:
    """Takes the MTP layer out of the target's checkpoint, where it follows the last layer.

    Its copies of embedding and head are left out, the draft uses the target's. A checkpoint
    with several such layers gives the first one.

    Args:
        tensors: of `dequantised`, names with or without `model.`.

    Returns:
        Tensors under the names of `MtpDraft`; matrices that are stored in 2 bytes are widened, for
        its layer takes some of them apart.

    Raises:
        InputError: the layer or a tensor of it is missing, unexpected, of another shape or
            not finite.
    """
    layer, hidden = config.num_hidden_layers, config.hidden_size
    prefix = f"layers.{layer}."
    names = {
        name: original
        for name, original in canonical_names(tensors, source=source).items()
        if name.startswith(prefix)
    }
    if not names:
        raise InputError(
            f"{source} has no tensors of layer {layer}, the multi-token prediction layer; use a"
            " checkpoint that has it, or another method"
        )
    for copy in _COPIES:
        if names.pop(prefix + copy, None) is not None:
            _LOGGER.info("%s: %s is ignored, the draft uses the target's", source, prefix + copy)
    expected: Shapes = {
        f"{prefix}enorm.weight": (hidden,),
        f"{prefix}hnorm.weight": (hidden,),
        f"{prefix}eh_proj.weight": (hidden, 2 * hidden),
        f"{prefix}shared_head.norm.weight": (hidden,),
        **layer_shapes(config, layer),
    }
    state = validated_state_dict(
        tensors,
        names,
        expected,
        source=source,
        model="the multi-token prediction layer",
        use_unquantised=USE_QUANTISED,
    )
    plain = {
        name: as_floats(tensor) if isinstance(tensor, StoredMatrix) else tensor
        for name, tensor in state.items()
    }
    ours = in_layout(plain, config, layer, prefix.removesuffix("."))
    return {_our_name(name.removeprefix(prefix)): tensor for name, tensor in ours.items()}


def _our_name(name: str) -> str:
    if name == "shared_head.norm.weight":
        return "norm.weight"
    return name if name.startswith(("enorm.", "hnorm.", "eh_proj.")) else f"layer.{name}"
