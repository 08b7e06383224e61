"""A Kimi K2.5 checkpoint: the language model's part, and the vision part under our names."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final, TypeVar

from unispec.checkpoints import Tensor, Weight
from unispec.checkpoints.validation import validated_state_dict

from .config import VisionConfig

__all__ = ["language_tensors", "vision_state_dict", "vision_tensors"]

_LANGUAGE: Final = "language_model."
_VISION: Final = ("vision_tower.", "mm_projector.")

_W = TypeVar("_W", bound=Weight)


def language_tensors(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The language model's tensors under DeepSeek-V3's names."""
    return {
        name.removeprefix(_LANGUAGE): tensor
        for name, tensor in tensors.items()
        if not name.startswith(_VISION)
    }


def vision_tensors(tensors: Mapping[str, _W]) -> dict[str, _W]:
    """Those of tower and projector, under the checkpoint's names."""
    return {name: tensor for name, tensor in tensors.items() if name.startswith(_VISION)}


def vision_state_dict(
    tensors: Mapping[str, Any], config: VisionConfig, *, source: str
) -> dict[str, Tensor]:
    """Checks tower and projector and renames their tensors.

    Returns:
        The tensors of `VisionModel`, and `positions` `[height, width, D]`, which the host reads.

    Raises:
        InputError: a tensor is missing, unexpected, of another shape or not finite.
    """
    names = {name: name for name in vision_tensors(tensors)}
    size, patch, inner = config.hidden_size, config.patch_size, config.intermediate_size
    joined = 4 * size
    shapes: dict[str, tuple[int, ...]] = {
        "vision_tower.patch_embed.proj.weight": (size, 3, patch, patch),
        "vision_tower.patch_embed.proj.bias": (size,),
        "vision_tower.patch_embed.pos_emb.weight": (
            config.position_height,
            config.position_width,
            size,
        ),
        "mm_projector.proj.0.weight": (joined, joined),
        "mm_projector.proj.0.bias": (joined,),
        "mm_projector.proj.2.weight": (config.text_hidden_size, joined),
        "mm_projector.proj.2.bias": (config.text_hidden_size,),
    }
    norms = ["vision_tower.encoder.final_layernorm", "mm_projector.pre_norm"]
    linears: dict[str, tuple[int, int]] = {}
    for block in range(config.num_hidden_layers):
        prefix = f"vision_tower.encoder.blocks.{block}"
        norms += [f"{prefix}.norm0", f"{prefix}.norm1"]
        linears[f"{prefix}.wqkv"] = (3 * size, size)
        linears[f"{prefix}.wo"] = (size, size)
        linears[f"{prefix}.mlp.fc0"] = (inner, size)
        linears[f"{prefix}.mlp.fc1"] = (size, inner)
    for name, shape in linears.items():
        shapes |= {f"{name}.weight": shape, f"{name}.bias": shape[:1]}
    for name in norms:
        shapes |= {f"{name}.weight": (size,), f"{name}.bias": (size,)}
    state = validated_state_dict(
        tensors, names, shapes, source=source, model="Kimi K2.5's vision tower"
    )
    # The convolution's kernel is as large as its stride: a product over each patch.
    proj = "vision_tower.patch_embed.proj.weight"
    state[proj] = state[proj].reshape(size, -1)
    return {_our_name(name): tensor for name, tensor in state.items()}


def _our_name(name: str) -> str:
    renamed = {
        "vision_tower.patch_embed.pos_emb.weight": "positions",
        "vision_tower.patch_embed.proj.": "patch_embed.",
        "vision_tower.encoder.": "",
        "mm_projector.proj.": "proj_",
        "mm_projector.": "",
    }
    for theirs, ours in renamed.items():
        if name.startswith(theirs):
            name = ours + name.removeprefix(theirs)
            break
    for layer in ("wqkv.", "wo."):
        name = name.replace(f".{layer}", f".attention.{layer}")
    return name.replace(".mlp.", ".")
