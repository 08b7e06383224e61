"""An EAGLE draft checkpoint as the state dictionary of our draft."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Final

from unispec.checkpoints.tensors import Weight
from unispec.checkpoints.validation import validated_state_dict
from unispec.pipelines.drafts.weights import DraftTensors, TargetShape, read_draft_names
from unispec.pipelines.targets.llama.weights import LlamaShape, decoder_layer_shapes

__all__ = ["FC_BIAS", "QKV_BIAS", "eagle_state_dict"]

FC_BIAS: Final = "fc.bias"
"""Of the projection of token and feature."""
QKV_BIAS: Final = "layers.0.self_attn.q_proj.bias"
"""Where it is, q, k and v projections of all layers have one."""


def eagle_state_dict(
    tensors: Mapping[str, Weight],
    draft_config: LlamaShape,
    target_config: TargetShape,
    *,
    source: str,
) -> DraftTensors:
    """Checks an EAGLE checkpoint and renames its tensors.

    `fc.bias` is used if it is there, whatever the configuration says, because published
    training code wrote it without regard to the flag; likewise the biases of q, k and v, which
    drafts of Qwen2 have.

    Args:
        draft_config: the draft's shape. `draft_vocab_size`, if it is there and not None,
            must be the length of `d2t`.

    Returns:
        `fc.weight` `[H, 2 * H]`, `fc.bias` `[H]` where there is one, and the decoder layers under
        Hugging Face's names without `model.`; layer 0 has no `input_layernorm`.

    Raises:
        InputError: the draft was made for another hidden size, a tensor is missing, unknown, of
            another shape or not finite, or `d2t` is no one-to-one map into its vocabulary.
    """
    shared = read_draft_names(tensors, draft_config, target_config, source=source)
    expected = _expected_shapes(draft_config, shared.names)
    state = validated_state_dict(
        tensors, shared.names, expected, source=source, model="an EAGLE draft"
    )
    return DraftTensors(state, shared.d2t)


def _expected_shapes(config: LlamaShape, names: Collection[str]) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {"fc.weight": (config.hidden_size, 2 * config.hidden_size)}
    if FC_BIAS in names:
        shapes[FC_BIAS] = (config.hidden_size,)
    for layer in range(config.num_hidden_layers):
        shapes |= decoder_layer_shapes(
            config, layer, input_norm=layer > 0, qkv_bias=QKV_BIAS in names
        )
    return shapes
