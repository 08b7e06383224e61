"""Which draft is trained, and of what shape."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from unispec.errors import InputError
from unispec.methods import Method

from .beginning import read_mask_token, read_weights, take_weights
from .collection import Collection
from .dflash import DFlashDraft
from .draft import Draft
from .eagle import EagleDraft
from .target import TorchTarget

__all__ = ["DraftShape", "check_beginning", "make_draft"]

_LAYERS = {"eagle": 1, "dflash": 3}
_TAPS = 3


@dataclass(frozen=True, kw_only=True)
class DraftShape:
    """What is to be trained.

    Attributes:
        method: `eagle` or `dflash`.
        layers: decoder layers; None: 1 for EAGLE, 3 for DFlash.
        vocab_size: how many tokens it proposes, the most frequent ones; None: all.
        block_size: slots of a DFlash block.
        mask_token_id: the token of a DFlash block's slots to be filled; None: one that the
            target never writes, or seldom.
    """

    method: Method
    layers: int | None = None
    vocab_size: int | None = None
    block_size: int = 6
    mask_token_id: int | None = None

    def check(self, config: Any) -> None:
        """Refuses what the target has no room for.

        Args:
            config: the target's.

        Raises:
            InputError: more tokens to propose than the target has.
        """
        if self.vocab_size is not None and self.vocab_size > config.vocab_size:
            raise InputError(
                f"--draft-vocab-size {self.vocab_size} is beyond the target's"
                f" {config.vocab_size} tokens: choose less"
            )

    def tapped_layers(self, config: Any) -> tuple[int, ...]:
        """The target's layers that the draft reads; none for EAGLE, which reads the final norm.

        For DFlash up to three, spread from the second to the third from the end.
        """
        if self.method == "eagle":
            return ()
        count = config.num_hidden_layers
        first = 1 if count > 3 else 0
        last = max(count - 3, first)
        spread = {round(first + (last - first) * i / (_TAPS - 1)) for i in range(_TAPS)}
        return tuple(sorted(spread))


def make_draft(
    target: TorchTarget,
    collection: Collection,
    shape: DraftShape,
    seed: int,
    begin_with: Path | None = None,
) -> Draft:
    """A draft that is to be fitted.

    Args:
        target: whose embedding and head it borrows.
        collection: says which tokens are frequent.
        shape: of the draft.
        seed: of its weights.
        begin_with: folder of a draft of the same shape, whose weights it takes instead.

    Raises:
        InputError: more tokens to propose than the target has, or a draft to begin with that is
            of another shape or cannot be read.
    """
    shape.check(target.config)
    counts = collection.count_tokens(target.config.vocab_size)
    torch.manual_seed(seed)
    seldom = int(counts.flip(0).argmin().neg() + len(counts) - 1)
    draft = _make(
        target.config,
        shape if begin_with is None else _with_mask(shape, target.config, begin_with),
        seldom,
        embedding=target.embedding.cpu(),
        head=target.head.cpu(),
        target_ids=_frequent(counts, shape.vocab_size, target),
    )
    if begin_with is not None:
        take_weights(draft, begin_with)
    return draft


def check_beginning(config: Any, shape: DraftShape, begin_with: Path) -> None:
    """Refuses a draft that a fit cannot begin with.

    Args:
        config: the target's.
        shape: of the draft that is to be fitted.
        begin_with: folder of the other.

    Raises:
        InputError: it is of another shape or cannot be read.
    """
    with torch.device("meta"):
        borrowed = torch.empty(config.vocab_size, config.hidden_size)
        shape = _with_mask(shape, config, begin_with)
        draft = _make(config, shape, 0, embedding=borrowed, head=borrowed, target_ids=None)
    read_weights(draft, begin_with)


def _with_mask(shape: DraftShape, config: Any, begin_with: Path) -> DraftShape:
    """A DFlash draft goes on with the mask token whose embedding it has learnt to read."""
    if shape.method == "eagle" or shape.mask_token_id is not None:
        return shape
    return replace(shape, mask_token_id=read_mask_token(begin_with, config.vocab_size))


def _make(config: Any, shape: DraftShape, seldom: int, **borrowed: Tensor | None) -> Draft:
    """With random weights; `seldom` is the mask token of a DFlash shape that has none."""
    layers = shape.layers or _LAYERS[shape.method]
    if shape.method == "eagle":
        return EagleDraft(config, layers, **borrowed)
    return DFlashDraft(
        config,
        layers,
        block_size=shape.block_size,
        target_layer_ids=shape.tapped_layers(config),
        mask_token_id=seldom if shape.mask_token_id is None else shape.mask_token_id,
        **borrowed,
    )


def _frequent(counts: Tensor, size: int | None, target: TorchTarget) -> Tensor | None:
    if size is None or size == len(counts):
        return None
    ranked = counts.clone()
    ranked[target.eos] = counts.max() + 1  # what ends an answer must be foreseen
    return ranked.argsort(descending=True, stable=True)[:size].sort().values
