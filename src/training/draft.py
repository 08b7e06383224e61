"""What the drafts under training have in common.

In shapes B are the sequences of a step, T their tokens, padded to the longest one.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .collection import Example

__all__ = ["Draft", "padded"]


class Draft(nn.Module, ABC):
    """A draft, and what it shares with its target, which is not trained.

    Its parameters have the names of the checkpoint format.

    Args:
        embedding: the target's, float32 `[V, H]`.
        head: the target's, float32 `[V, H]`.
        target_ids: the N tokens that it proposes, int64 `[N]`, ascending; None proposes all.
    """

    num_proposals: int
    """K of the acceptance measure."""

    initial_draft = "none"
    """Which draft its first weights are from."""

    def __init__(self, embedding: Tensor, head: Tensor, target_ids: Tensor | None) -> None:
        super().__init__()
        self.reduced = target_ids is not None
        ids = torch.arange(len(head)) if target_ids is None else target_ids
        draft_ids = torch.full((len(head),), -1)
        draft_ids[ids] = torch.arange(len(ids))
        for name, borrowed in (
            ("embedding", embedding),
            ("head", head if target_ids is None else head[ids]),  # [N, H]
            ("target_ids", ids),  # [N]
            ("draft_ids", draft_ids),  # [V]; -1 where it does not propose
        ):
            self.register_buffer(name, borrowed.clone(), persistent=False)
        self.embedding: Tensor
        self.head: Tensor
        self.target_ids: Tensor
        self.draft_ids: Tensor

    @abstractmethod
    def loss(self, batch: Sequence[Example], generator: torch.Generator) -> Tensor:
        """The mean loss over the answers of some sequences.

        Args:
            generator: for what the draft draws; on the CPU.
        """

    @abstractmethod
    def matches(self, example: Example) -> Tensor:
        """Which proposals are right, along a greedy answer.

        Returns:
            bool `[A, K]`: whether proposal 1, 2, ... at each of A positions of the answer is the
            token that follows; it counts only where those before it are right.
        """

    @abstractmethod
    def config(self) -> dict[str, Any]:
        """The checkpoint's config.json."""

    def tensors(self) -> dict[str, Tensor]:
        """The checkpoint's tensors by name, in the formats that they are trained in."""
        found = dict(self.state_dict())
        if self.reduced:
            found["d2t"] = self.target_ids - torch.arange(len(self.target_ids)).to(self.target_ids)
        return found

    def proposed(self, outputs: Tensor) -> Tensor:
        """The most probable token `[...]` of each output `[..., H]`."""
        return self.target_ids[(outputs @ self.head.T).argmax(dim=-1)]


def padded(batch: Sequence[Example], device: torch.device) -> tuple[Tensor, Tensor]:
    """Tokens `[B, T]` and features `[B, T, F]` of sequences, zeros behind their ends."""
    pad = nn.utils.rnn.pad_sequence
    return (
        pad([one.tokens for one in batch], batch_first=True).to(device),
        pad([one.features for one in batch], batch_first=True).to(device),
    )
