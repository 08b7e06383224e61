"""Which draft is trained, and of what shape."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from unispec.errors import InputError
from unispec.methods import Method

from .beginning import read_config, take_weights
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
    return _make(target, counts, shape, seed, begin_with)


def check_beginning(target: TorchTarget, shape: DraftShape, begin_with: Path) -> None:
    """Refuses a draft that a fit cannot begin with.

    Args:
        target: of the fit.
        shape: of the draft that is to be fitted.
        begin_with: folder of the other.

    Raises:
        InputError: it is of another shape or cannot be read.
    """
    every = torch.zeros(target.config.vocab_size, dtype=torch.long)
    _make(target, every, replace(shape, vocab_size=None), 0, begin_with)


def _make(
    target: TorchTarget, counts: Tensor, shape: DraftShape, seed: int, begin_with: Path | None
) -> Draft:
    """See `make_draft`; `counts` says how often each token was written, int64 `[V]`."""
    if begin_with is not None:
        # The draft learnt what the embedding of its own mask token means.
        mask = read_config(begin_with).get("dflash_config", {}).get("mask_token_id")
        draft = _make(target, counts, replace(shape, mask_token_id=mask), seed, None)
        take_weights(draft, begin_with)
        return draft
    torch.manual_seed(seed)
    config: Any = target.config
    layers = shape.layers or _LAYERS[shape.method]
    borrowed: dict[str, Tensor | None] = {
        "embedding": target.embedding.cpu(),
        "head": target.head.cpu(),
        "target_ids": _frequent(counts, shape.vocab_size, target),
    }
    if shape.method == "eagle":
        return EagleDraft(config, layers, **borrowed)
    seldom = int(counts.flip(0).argmin().neg() + len(counts) - 1)
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
