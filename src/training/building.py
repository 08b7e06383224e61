"""Makes the draft that is to be trained, with random weights or those of another."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .collection import Collection
from .dflash import DFlashDraft
from .draft import Draft
from .eagle import EagleDraft
from .eagle3 import Eagle3Draft
from .initial_weights import read_mask_token, read_weights, take_weights
from .settings import DraftShape
from .target import TorchTarget

__all__ = ["check_initial_draft", "make_draft"]


def make_draft(
    target: TorchTarget,
    collection: Collection,
    shape: DraftShape,
    seed: int,
    initial_draft: Path | None = None,
) -> Draft:
    """A draft that is to be fitted.

    Args:
        target: the draft shares its embedding and head.
        collection: its answers say which tokens are frequent.
        seed: for random weights.
        initial_draft: folder of a draft of the same shape, whose weights it takes instead.

    Raises:
        InputError: more tokens to propose than the target has, or an initial draft of another
            shape or that cannot be read.
    """
    shape.check(target.config)
    counts = collection.count_tokens(target.config.vocab_size)
    torch.manual_seed(seed)
    rarest = int(counts.flip(0).argmin().neg() + len(counts) - 1)
    draft = _build(
        target.config,
        shape if initial_draft is None else _with_mask(shape, target.config, initial_draft),
        rarest,
        target.norm.cpu(),
        embedding=target.embedding.cpu(),
        head=target.head.cpu(),
        target_ids=_frequent(counts, shape.vocab_size, target),
    )
    if initial_draft is not None:
        take_weights(draft, initial_draft)
    return draft


def check_initial_draft(config: Any, shape: DraftShape, initial_draft: Path) -> None:
    """Refuses a draft whose weights a fit cannot start from.

    Args:
        config: the target's configuration.
        shape: what is to be fitted.

    Raises:
        InputError: it is of another shape or cannot be read.
    """
    with torch.device("meta"):
        borrowed = torch.empty(config.vocab_size, config.hidden_size)
        shape = _with_mask(shape, config, initial_draft)
        draft = _build(
            config, shape, 0, borrowed[0], embedding=borrowed, head=borrowed, target_ids=None
        )
    read_weights(draft, initial_draft)


def _with_mask(shape: DraftShape, config: Any, initial_draft: Path) -> DraftShape:
    """A DFlash draft goes on with the mask token whose embedding it has learnt to read."""
    if shape.method != "dflash" or shape.mask_token_id is not None:
        return shape
    return replace(shape, mask_token_id=read_mask_token(initial_draft, config.vocab_size))


def _build(
    config: Any, shape: DraftShape, rarest: int, norm: Tensor, **borrowed: Tensor | None
) -> Draft:
    """With random weights.

    Args:
        rarest: the mask token of a DFlash shape that has none.
        norm: the target's final norm.
    """
    if shape.method == "eagle":
        return EagleDraft(config, shape.num_layers, **borrowed)
    if shape.method == "eagle3":
        return Eagle3Draft(config, norm, **borrowed)
    return DFlashDraft(
        config,
        shape.num_layers,
        block_size=shape.block_size,
        target_layer_ids=shape.tapped_layers(config),
        mask_token_id=rarest if shape.mask_token_id is None else shape.mask_token_id,
        **borrowed,
    )


def _frequent(counts: Tensor, size: int | None, target: TorchTarget) -> Tensor | None:
    if size is None or size == len(counts):
        return None
    ranked = counts.clone()
    ranked[target.eos] = counts.max() + 1  # what ends an answer must be proposed
    return ranked.argsort(descending=True, stable=True)[:size].sort().values
