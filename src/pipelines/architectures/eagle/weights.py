"""An EAGLE draft checkpoint as the state dictionary of our draft."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final, Protocol

import numpy as np
import numpy.typing as npt

from unispec.checkpoints.tensors import Tensor
from unispec.checkpoints.validation import canonical_names, validated_state_dict
from unispec.errors import InputError
from unispec.pipelines.architectures.llama3.weights import LlamaShape, decoder_layer_shapes

__all__ = ["EagleWeights", "TargetShape", "eagle_state_dict"]

_LOGGER: Final = logging.getLogger(__name__)
_FC_BIAS: Final = "fc.bias"
_ID_OFFSETS: Final = "d2t"
# EAGLE-3's mask over the target's vocabulary: needed in training only.
_ID_MASK: Final = "t2d"


class TargetShape(Protocol):
    """The part of a target's configuration that a draft must agree with."""

    @property
    def hidden_size(self) -> int:
        """Width of the residual stream."""

    @property
    def vocab_size(self) -> int:
        """Rows of the embedding."""


@dataclass(frozen=True)
class EagleWeights:
    """The weights of an EAGLE draft.

    Attributes:
        state: `fc.weight` [H, 2H], `fc.bias` [H] where there is one, and the decoder
            layers under Hugging Face's names without `model.`; layer 0 has no
            `input_layernorm`. Embedding and head are the target's.
        has_fc_bias: Whether `state` has `fc.bias`.
        d2t: int64 [N], where the draft proposes only N tokens of the target's
            vocabulary: target id = draft id + d2t[draft id], one to one.
    """

    state: dict[str, Tensor]
    has_fc_bias: bool
    d2t: npt.NDArray[np.int64] | None


def eagle_state_dict(
    tensors: Mapping[str, Tensor],
    draft_config: LlamaShape,
    target_config: TargetShape,
    *,
    source: str,
) -> EagleWeights:
    """Check an EAGLE checkpoint and rename its tensors.

    EAGLE trains with the target's frozen embedding and head, and many published
    drafts carry a copy of one or both. The draft always runs with the target's own:
    a copy of the right shape is ignored with a warning, one of another shape means
    that the draft belongs to another target. `fc.bias` is used if it is there,
    whatever the configuration says, because published training code wrote it
    without regard to the flag.

    Args:
        tensors: The checkpoint's tensors, names with or without `model.`.
        draft_config: The shape of the draft. `draft_vocab_size`, if it is there
            and not None, must be the length of `d2t`.
        target_config: The shape of the target.
        source: The file or folder, for the errors.

    Raises:
        InputError: If the draft was made for another hidden size or vocabulary, a
            tensor is missing, unknown, of another shape or has NaN or infinite
            values, or `d2t` is no one-to-one map into the target's vocabulary.
    """
    _check_agreement("hidden_size", draft_config.hidden_size, target_config.hidden_size, source)
    _check_agreement("vocab_size", draft_config.vocab_size, target_config.vocab_size, source)
    names = canonical_names(tensors, source=source)
    names.pop(_ID_MASK, None)
    offsets = names.pop(_ID_OFFSETS, None)
    d2t = _id_offsets(
        None if offsets is None else tensors[offsets],
        getattr(draft_config, "draft_vocab_size", None),
        target_config.vocab_size,
        source,
    )
    _drop_target_copies(tensors, names, target_config, d2t, source)
    expected = _expected_shapes(draft_config, has_fc_bias=_FC_BIAS in names)
    state = validated_state_dict(tensors, names, expected, source=source, model="an EAGLE draft")
    return EagleWeights(state=state, has_fc_bias=_FC_BIAS in state, d2t=d2t)


def _check_agreement(key: str, draft: int, target: int, source: str) -> None:
    if draft != target:
        raise InputError(
            f"{source}: the draft has {key} {draft} and the target {target}: use a draft that was"
            " trained for this target"
        )


def _expected_shapes(config: LlamaShape, *, has_fc_bias: bool) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {"fc.weight": (config.hidden_size, 2 * config.hidden_size)}
    if has_fc_bias:
        shapes[_FC_BIAS] = (config.hidden_size,)
    for layer in range(config.num_hidden_layers):
        shapes |= decoder_layer_shapes(config, layer, input_norm=layer > 0)
    return shapes


def _drop_target_copies(
    tensors: Mapping[str, Tensor],
    names: dict[str, str],
    target: TargetShape,
    d2t: npt.NDArray[np.int64] | None,
    source: str,
) -> None:
    """Remove the copies of the target's embedding and head from `names`."""
    full = (target.vocab_size, target.hidden_size)
    allowed = {"embed_tokens.weight": [full], "lm_head.weight": [full]}
    if d2t is not None:
        allowed["lm_head.weight"].append((d2t.size, target.hidden_size))
    for name, shapes in allowed.items():
        if name not in names:
            continue
        original = names.pop(name)
        found = tensors[original].shape
        if found not in shapes:
            raise InputError(
                f"{source}: tensor {original!r} has shape {list(found)}, the target's has"
                f" {list(full)}: use a draft that was trained for this target"
            )
        _LOGGER.warning("%s: %r is ignored, the draft uses the target's", source, original)


def _id_offsets(
    tensor: Tensor | None, draft_vocab_size: int | None, vocab_size: int, source: str
) -> npt.NDArray[np.int64] | None:
    """`d2t` as int64 [N], checked; None where the draft has the full vocabulary."""
    if tensor is None:
        if draft_vocab_size is None or draft_vocab_size == vocab_size:
            return None
        raise InputError(
            f"{source} lacks tensor 'd2t' for its draft_vocab_size {draft_vocab_size}: add the"
            f" tensor, or remove draft_vocab_size if the draft has all {vocab_size} tokens"
        )
    if tensor.ndim != 1 or tensor.size == 0 or not np.issubdtype(tensor.dtype, np.integer):
        raise InputError(
            f"{source}: tensor 'd2t' has shape {list(tensor.shape)} and dtype {tensor.dtype},"
            " expected int64 of shape [draft_vocab_size]: write it as EAGLE-3 does"
        )
    if draft_vocab_size is not None and tensor.size != draft_vocab_size:
        raise InputError(
            f"{source}: tensor 'd2t' has {tensor.size} entries and draft_vocab_size is"
            f" {draft_vocab_size}: correct the draft's config.json"
        )
    d2t = tensor.astype(np.int64)
    ids = np.arange(d2t.size) + d2t  # [N]
    outside = np.flatnonzero((ids < 0) | (ids >= vocab_size))
    if outside.size:
        draft_id = int(outside[0])
        raise InputError(
            f"{source}: tensor 'd2t' maps draft id {draft_id} to {int(ids[draft_id])}, outside the"
            f" target's {vocab_size} tokens: write offsets (target id - draft id) for this target"
        )
    targets, counts = np.unique(ids, return_counts=True)
    if targets.size < ids.size:
        raise InputError(
            f"{source}: tensor 'd2t' maps {int(counts.max())} draft ids to the target id"
            f" {int(targets[counts.argmax()])}: write offsets (target id - draft id), one to one"
        )
    return d2t
