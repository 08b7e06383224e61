"""An EAGLE-3 draft checkpoint as the state dictionary of our draft."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Final

import numpy as np
import numpy.typing as npt

from unispec.checkpoints.halves import half_bytes
from unispec.checkpoints.rounding import is_rounded
from unispec.checkpoints.stored import StoredMatrix, as_floats
from unispec.checkpoints.tensors import Weight
from unispec.checkpoints.tied_head import EMBEDDING, HEAD, same_rows
from unispec.checkpoints.validation import validated_state_dict
from unispec.errors import InputError
from unispec.pipelines.drafts.weights import (
    DraftTensors,
    TargetShape,
    draft_weights,
    read_draft_names,
)
from unispec.pipelines.targets.llama.weights import LlamaShape, decoder_layer_shapes
from unispec.pipelines.unified.method import DraftWeights

__all__ = ["EMBEDDING", "FC_BIAS", "QKV_BIAS", "Q_NORM", "eagle3_weights"]

FC_BIAS: Final = "fc.bias"
"""Of the projection of the tapped outputs."""
QKV_BIAS: Final = "layers.0.self_attn.q_proj.bias"
"""Where it is, q, k and v projections of all layers have one."""
Q_NORM: Final = "layers.0.self_attn.q_norm.weight"
"""Where it is, query and key heads of all layers are normed."""


def eagle3_weights(
    tensors: Mapping[str, Weight],
    draft_config: LlamaShape,
    target_config: TargetShape,
    target: Mapping[str, Weight],
    *,
    num_taps: int,
    norms: Collection[str],
    source: str,
) -> DraftWeights:
    """Checks an EAGLE-3 checkpoint, renames its tensors and completes them with the target's.

    Without a head of its own the draft has the target's, of its own tokens; an embedding that is
    a copy of the target's is left out.

    Args:
        draft_config: the draft's shape. `draft_vocab_size`, if it is there and not None, must be
            the length of `d2t`.
        target: the target's weights.
        num_taps: n, target layers that are read.
        norms: names of the norms before `fc`.

    Returns:
        `fc.weight` `[H, n * Ht]`, Ht the target's hidden size, `norm.weight`, the layers under
        Hugging Face's names without `model.`, in layer 0 with `hidden_norm` and queries, keys and
        values over `2 * H`, and where they are the draft's own `lm_head.weight` `[N, H]` and
        `embed_tokens.weight` `[V, H]`.

    Raises:
        InputError: the draft needs a target of another size, a tensor is missing, unknown, of
            another shape or not finite, or `d2t` is no one-to-one map into its vocabulary.
    """
    shared = read_draft_names(tensors, draft_config, target_config, has_own=True, source=source)
    names = shared.names
    hidden, read = draft_config.hidden_size, target_config.hidden_size
    _check_own(names, draft_config, target_config, source)
    _check_projection(tensors, names, read, num_taps, source)
    shapes = _layer_shapes(draft_config, names)
    shapes |= {
        "fc.weight": (hidden, num_taps * read),
        "norm.weight": (hidden,),
        **{name: (num_taps * read // len(norms),) for name in norms},
    }
    if FC_BIAS in names:
        shapes[FC_BIAS] = (hidden,)
    if EMBEDDING in names:
        shapes[EMBEDDING] = (draft_config.vocab_size, hidden)
    if HEAD in names:
        shapes[HEAD] = (shared.num_head_rows, hidden)
    state = validated_state_dict(tensors, names, shapes, source=source, model="an EAGLE-3 draft")
    head = state.pop(HEAD, None)
    if EMBEDDING in state:
        state |= _own_embedding(state.pop(EMBEDDING), target[EMBEDDING], source)
    return draft_weights(
        DraftTensors(state, shared.d2t),
        target,
        own_head=None if head is None else head[shared.head_rows],
    )


def _check_own(names: Collection[str], draft: LlamaShape, target: TargetShape, source: str) -> None:
    """Refuses a draft that lacks what its target cannot lend it."""
    for name in (EMBEDDING, HEAD):
        if draft.hidden_size != target.hidden_size and name not in names:
            raise InputError(
                f"{source}: the draft has hidden_size {draft.hidden_size}, the target"
                f" {target.hidden_size}, and the draft no {name!r} of its own: use a draft that was"
                " trained for this target"
            )
    if draft.tie_word_embeddings and EMBEDDING in names and HEAD not in names:
        raise InputError(
            f"{source}: the head is the draft's own embedding, which is not supported: store it as"
            f" {HEAD!r} too"
        )


def _check_projection(
    tensors: Mapping[str, Weight], names: Mapping[str, str], read: int, num_taps: int, source: str
) -> None:
    """Refuses a projection of more or less layers than config.json names."""
    columns = tensors[names["fc.weight"]].shape[-1:] if "fc.weight" in names else ()
    if columns and columns[0] % read == 0 and columns[0] != num_taps * read:
        raise InputError(
            f"{source}: tensor {names['fc.weight']!r} reads {columns[0] // read} layers of the"
            f" target, and config.json has {num_taps}: state as many in"
            " eagle_aux_hidden_state_layer_ids"
        )


def _own_embedding(own: Weight, target: Weight, source: str) -> dict[str, Weight]:
    """The draft's embedding `[V, H]` by its name, unless it is a copy of the target's.

    Of a target that is stored in another format the copy may be what it was before: the draft then
    has the rounded rows, as the target does. The target's rows stand in for tokens that the draft
    does not know.
    """
    known = min(len(own), len(target))
    if _is_copy(own[:known], target[:known]):
        return {}
    if known == len(target):
        return {EMBEDDING: own[:known]}
    if own.shape[1] != target.shape[1]:
        raise InputError(
            f"{source}: tensor {EMBEDDING!r} has {known} tokens, and the target {len(target)}: use"
            " a draft that was trained for this target"
        )
    return {EMBEDDING: _followed_by(own, as_floats(target[known:]))}


def _is_copy(own: Weight, target: Weight) -> bool:
    return same_rows(own, target) or (isinstance(target, StoredMatrix) and is_rounded(own, target))


def _followed_by(own: Weight, rows: npt.NDArray[np.float32]) -> Weight:
    """More rows behind the draft's own, in its format."""
    if not isinstance(own, StoredMatrix) or own.is_quantised:
        return np.concatenate([as_floats(own), rows])
    joined = np.concatenate([own.blocks, half_bytes(rows, own.kind)])
    return StoredMatrix(own.kind, (len(joined), own.shape[1]), joined)


def _layer_shapes(config: LlamaShape, names: Collection[str]) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {}
    for layer in range(config.num_hidden_layers):
        shapes |= decoder_layer_shapes(
            config, layer, qkv_bias=QKV_BIAS in names, qk_norm=Q_NORM in names
        )
    shapes["layers.0.hidden_norm.weight"] = (config.hidden_size,)
    for projection in "qkv":
        name = f"layers.0.self_attn.{projection}_proj.weight"
        shapes[name] = (shapes[name][0], 2 * config.hidden_size)
    return shapes
