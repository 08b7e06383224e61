"""A DFlash draft checkpoint as the state dictionary of our draft."""

from __future__ import annotations

from collections.abc import Mapping

from unispec.checkpoints.tensors import Weight
from unispec.checkpoints.validation import validated_state_dict
from unispec.pipelines.drafts.weights import DraftTensors, TargetShape, read_draft_names
from unispec.pipelines.targets.llama.weights import LlamaShape, decoder_layer_shapes

__all__ = ["dflash_state_dict"]


def dflash_state_dict(
    tensors: Mapping[str, Weight],
    draft_config: LlamaShape,
    target_config: TargetShape,
    *,
    num_taps: int,
    source: str,
) -> DraftTensors:
    """Checks a DFlash checkpoint and renames its tensors.

    Returns:
        `fc.weight` `[H, n * H]`, `hidden_norm.weight` and `norm.weight` `[H]`, and the layers
        under Hugging Face's names without `model.`.

    Raises:
        InputError: the draft was made for another hidden size, a tensor is missing, unknown,
            of another shape or not finite, or `d2t` is no one-to-one map into its vocabulary.
    """
    shared = read_draft_names(tensors, draft_config, target_config, source=source)
    hidden = draft_config.hidden_size
    shapes: dict[str, tuple[int, ...]] = {
        "fc.weight": (hidden, num_taps * hidden),
        "hidden_norm.weight": (hidden,),
        "norm.weight": (hidden,),
    }
    for layer in range(draft_config.num_hidden_layers):
        shapes |= decoder_layer_shapes(draft_config, layer, qk_norm=True)
    state = validated_state_dict(
        tensors, shared.names, shapes, source=source, model="a DFlash draft"
    )
    return DraftTensors(state, shared.d2t)
