"""What the checkpoints of drafts have in common, and how they join their target's."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final, Protocol

import numpy as np
import numpy.typing as npt

from unispec.checkpoints import Weight
from unispec.checkpoints.tied_head import EMBEDDING, HEAD
from unispec.checkpoints.validation import canonical_names
from unispec.errors import InputError
from unispec.pipelines.targets.llama.weights import LlamaShape
from unispec.pipelines.unified.method import DraftWeights

__all__ = ["DraftNames", "DraftTensors", "TargetShape", "draft_weights", "read_draft_names"]

_LOGGER: Final = logging.getLogger(__name__)
_ID_OFFSETS: Final = "d2t"
# EAGLE-3's mask over the target's vocabulary.
_MASK: Final = "t2d"
# Needed in training only, the last two by the `speculators` library for its loss.
_FOR_TRAINING: Final = (_MASK, "verifier_norm.weight", "verifier_lm_head.weight")
# That library's names of an EAGLE draft, and EAGLE-3's of its layer, to the published ones.
_RENAMED: Final = {"fusion_fc.": "fc.", "midlayer.": "layers.0.", "transformer.": "layers.0."}


class TargetShape(Protocol):
    """The part of a target's configuration that a draft must agree with."""

    @property
    def hidden_size(self) -> int:
        """Width of the residual stream."""

    @property
    def vocab_size(self) -> int:
        """Rows of the embedding."""


@dataclass(frozen=True)
class DraftNames:
    """What a draft's checkpoint holds beside what it shares with its target."""

    names: dict[str, str]
    """Our name of each tensor to the checkpoint's."""
    d2t: npt.NDArray[np.int64] | None
    """int64 `[N]`, where the draft proposes only N tokens of the target's vocabulary, or knows
    only these: target id = draft id + d2t[draft id], one to one."""
    num_head_rows: int
    """Tokens that the checkpoint's head has, if it has one."""
    head_rows: npt.NDArray[np.int64]
    """int64 `[N]`: those of them that the target knows."""


@dataclass(frozen=True)
class DraftTensors:
    """A draft's checkpoint under our names."""

    state: dict[str, Weight]
    """Without embedding and head, which are the target's."""
    d2t: npt.NDArray[np.int64] | None
    """See `DraftNames`."""


def read_draft_names(
    tensors: Mapping[str, Weight],
    draft_config: LlamaShape,
    target_config: TargetShape,
    *,
    has_own: bool = False,
    source: str,
) -> DraftNames:
    """Checks that a draft fits its target and sets aside what they share.

    EAGLE-1 and DFlash drafts are trained with the target's frozen embedding and head, and many
    published ones carry a copy of one or both. Such a draft always runs with the target's own: a
    copy of the right shape is ignored with a warning, one of another shape means that the
    draft belongs to another target.

    Draft and target may have different numbers of tokens: fine-tunes add some, and others
    pad. The first ones are the same, and the draft proposes those that both have.

    Args:
        draft_config: the draft's shape. `draft_vocab_size`, if it is there and not None,
            must be the length of `d2t`.
        has_own: whether embedding and head are the draft's own where the checkpoint has them.

    Raises:
        InputError: the draft was made for another hidden size, a tensor is there under two names,
            or `d2t` is no one-to-one map into its vocabulary.
    """
    if draft_config.hidden_size != target_config.hidden_size and not has_own:
        raise InputError(
            f"{source}: the draft has hidden_size {draft_config.hidden_size} and the target"
            f" {target_config.hidden_size}: use a draft that was trained for this target"
        )
    names = _published_names(canonical_names(tensors, source=source), source)
    mask = names.get(_MASK)
    for name in _FOR_TRAINING:
        names.pop(name, None)
    offsets = names.pop(_ID_OFFSETS, None)
    d2t = _id_offsets(
        None if offsets is None else tensors[offsets],
        getattr(draft_config, "draft_vocab_size", None),
        draft_config.vocab_size,
        source,
    )
    if not has_own:
        reduced = None if d2t is None else len(d2t)
        _drop_target_copies(tensors, names, draft_config, reduced, source)
    num_rows = draft_config.vocab_size if d2t is None else len(d2t)
    target_ids = np.arange(num_rows) + (0 if d2t is None else d2t)
    if d2t is not None and mask is not None:
        _check_mask(tensors[mask], target_ids, draft_config.vocab_size, source)
    d2t = _shared(d2t, draft_config.vocab_size, target_config.vocab_size, source)
    known = np.flatnonzero(target_ids < target_config.vocab_size)
    if d2t is None:
        # Then all ids are the target's, in its order.
        known = known[np.argsort(target_ids[known])]
    return DraftNames(names, d2t, num_head_rows=len(target_ids), head_rows=known)


def draft_weights(
    draft: DraftTensors, target: Mapping[str, Weight], *, own_head: Weight | None = None
) -> DraftWeights:
    """The weights of a draft that shares its target's embedding and head, or the embedding alone.

    A draft with a reduced vocabulary gets those rows of the target's head as a head
    of its own: on a small target the head is most of what a draft step reads.

    Args:
        own_head: `[N, H]`, the draft's; None: it has the target's.
    """
    head = target[HEAD if HEAD in target else EMBEDDING]
    own: dict[str, Weight] = {} if own_head is None else {HEAD: own_head}
    if draft.d2t is None:
        return DraftWeights(draft.state | own, own_head=bool(own))
    size = len(draft.d2t)  # N
    target_ids = np.arange(size, dtype=np.int64) + draft.d2t  # [N]
    draft_ids = np.full(len(head), size, dtype=np.int64)  # [V]; N stands for "none"
    draft_ids[target_ids] = np.arange(size, dtype=np.int64)
    reduced: dict[str, Weight] = {HEAD: head[target_ids], "d2t": draft.d2t, "t2d": draft_ids}
    return DraftWeights(draft.state | reduced | own, num_proposed=size, own_head=bool(own))


def _published_names(names: Mapping[str, str], source: str) -> dict[str, str]:
    published: dict[str, str] = {}
    for name, original in names.items():
        for prefix, other in _RENAMED.items():
            if name.startswith(prefix):
                name = other + name.removeprefix(prefix)
        if name in published:
            raise InputError(
                f"{source} has both {published[name]!r} and {original!r}: remove one of them"
            )
        published[name] = original
    return published


def _drop_target_copies(
    tensors: Mapping[str, Weight],
    names: dict[str, str],
    draft: TargetShape,
    num_proposed: int | None,
    source: str,
) -> None:
    """Remove the copies of the target's embedding and head from `names`."""
    full = (draft.vocab_size, draft.hidden_size)
    allowed = {"embed_tokens.weight": [full], "lm_head.weight": [full]}
    if num_proposed is not None:
        allowed["lm_head.weight"].append((num_proposed, draft.hidden_size))
    for name, shapes in allowed.items():
        if name not in names:
            continue
        original = names.pop(name)
        found = tensors[original].shape
        if found not in shapes:
            raise InputError(
                f"{source}: tensor {original!r} has shape {list(found)}, its config.json says"
                f" {list(full)}: use the config.json that belongs to the draft"
            )
        _LOGGER.warning("%s: %r is ignored, the draft uses the target's", source, original)


def _shared(
    d2t: npt.NDArray[np.int64] | None, draft_vocab_size: int, target_vocab_size: int, source: str
) -> npt.NDArray[np.int64] | None:
    """`d2t` without the tokens that only the draft has; None if it may propose all others."""
    if d2t is None:
        added = target_vocab_size > draft_vocab_size
        return np.zeros(draft_vocab_size, np.int64) if added else None
    ids = np.arange(d2t.size) + d2t  # [N]
    ids = ids[ids < target_vocab_size]
    if not ids.size:
        raise InputError(
            f"{source}: tensor 'd2t' names none of the target's {target_vocab_size} tokens: use a"
            " draft that was trained for this target"
        )
    return None if ids.size == target_vocab_size else ids - np.arange(ids.size)


def _check_mask(mask: Weight, ids: npt.NDArray[np.int64], vocab_size: int, source: str) -> None:
    """Refuses a mask over the target's tokens that marks others than `d2t` names."""
    if not isinstance(mask, np.ndarray) or mask.dtype != np.bool_ or mask.shape != (vocab_size,):
        found = f"{mask.dtype} of shape {list(mask.shape)}"
        raise InputError(
            f"{source}: tensor 't2d' is {found}, expected bool of shape [{vocab_size}]: remove it,"
            " or use the config.json that belongs to the draft"
        )
    named = np.zeros(vocab_size, np.bool_)
    named[ids] = True
    if wrong := int((mask != named).sum()):
        raise InputError(
            f"{source}: tensors 't2d' and 'd2t' contradict each other for {wrong} tokens: write"
            " offsets (target id - draft id) in 'd2t'"
        )


def _id_offsets(
    tensor: Weight | None, draft_vocab_size: int | None, vocab_size: int, source: str
) -> npt.NDArray[np.int64] | None:
    """`d2t` as int64 [N], checked; None where the draft has the full vocabulary."""
    if tensor is None:
        if draft_vocab_size is None or draft_vocab_size == vocab_size:
            return None
        raise InputError(
            f"{source} lacks tensor 'd2t' for its draft_vocab_size {draft_vocab_size}: add the"
            f" tensor, or remove draft_vocab_size if the draft has all {vocab_size} tokens"
        )
    if (
        not isinstance(tensor, np.ndarray)
        or tensor.ndim != 1
        or tensor.size == 0
        or not np.issubdtype(tensor.dtype, np.integer)
    ):
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
            f"{source}: tensor 'd2t' maps draft id {draft_id} to {int(ids[draft_id])}, outside its"
            f" vocabulary of {vocab_size} tokens: write offsets (target id - draft id)"
        )
    if d2t.size == vocab_size:
        if d2t.any():
            raise InputError(
                f"{source}: tensor 'd2t' reorders all {vocab_size} tokens of the target: a draft of"
                " the full vocabulary needs none, remove it"
            )
        return None
    targets, counts = np.unique(ids, return_counts=True)
    if targets.size < ids.size:
        raise InputError(
            f"{source}: tensor 'd2t' maps {int(counts.max())} draft ids to the target id"
            f" {int(targets[counts.argmax()])}: write offsets (target id - draft id), one to one"
        )
    return d2t
