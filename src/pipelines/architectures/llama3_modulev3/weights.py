"""A Hugging Face checkpoint as the weights of our Llama 3."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Final

from unispec.checkpoints import Tensor
from unispec.checkpoints.tied_head import tied_names
from unispec.checkpoints.validation import canonical_names, validated_state_dict
from unispec.pipelines.targets.llama.config import Llama3Config
from unispec.pipelines.targets.llama.weights import expected_shapes

__all__ = ["state_dict"]

_QKV: Final = ("q_proj", "k_proj", "v_proj")
_GATE_UP: Final = ("gate_proj", "up_proj")


def state_dict(
    tensors: Mapping[str, Tensor], config: Llama3Config, *, source: str
) -> dict[str, Tensor]:
    """Checks a checkpoint and renames its tensors; dtypes are left as they are.

    Returns:
        Tensors under Hugging Face's names without `model.`; no `lm_head.weight` where the head
        is the embedding.

    Raises:
        InputError: a tensor is missing, unknown, of another shape, not of floating point or
            not finite.
    """
    names = canonical_names(tensors, source=source)
    if config.tie_word_embeddings:
        names = tied_names(tensors, names)
    return validated_state_dict(tensors, names, _shapes(config), source=source, model="the model")


def _shapes(config: Llama3Config) -> dict[str, tuple[int, ...]]:
    """Llama's names and shapes, with joined projections and layer norms where there are any."""
    shapes: dict[str, tuple[int, ...]] = {}
    for name, shape in _with_norms(config):
        parent, _, rest = name.rpartition("_proj.")
        block, _, projection = parent.rpartition(".")
        joined = None
        if config.stacked_qkv and f"{projection}_proj" in _QKV:
            joined = "qkv_proj"
        elif config.stacked_mlp and f"{projection}_proj" in _GATE_UP:
            joined = "gate_up_proj"
        if joined is not None:
            name = f"{block}.{joined}.{rest}"
            rows, *columns = shape
            shape = (rows + shapes.get(name, (0,))[0], *columns)
        shapes[name] = shape
    return shapes


def _with_norms(config: Llama3Config) -> Iterator[tuple[str, tuple[int, ...]]]:
    is_layer_norm = config.norm_method == "layer_norm"
    for name, shape in expected_shapes(config).items():
        is_norm = name.endswith("norm.weight")
        if is_norm and is_layer_norm and not config.norm_elementwise_affine:
            continue
        yield name, shape
        if is_norm and is_layer_norm:
            yield name.removesuffix("weight") + "bias", shape
