"""Drafts that propose a block of tokens at once (DFlash), and the step they are part of."""

from __future__ import annotations

from typing import Protocol

from max.dtype import DType
from max.graph import TensorValue
from max.nn.kv_cache import PagedCacheValues

from unispec.kv_cache.views import grown_view
from unispec.sampling.acceptance import AcceptanceRule
from unispec.sampling.seeds import positions

from .deferred import Unread
from .proposal import DraftVocabulary, first_columns, propose, room_for_proposals
from .step import StepInputs, StepOutputs
from .verify import Target, branch, verify

__all__ = ["BlockDraft", "block_step"]


class BlockDraft(DraftVocabulary, Protocol):
    """A draft that reads the target's features from its cache and fills a block of slots."""

    @property
    def block_size(self) -> int:
        """Slots of a block; the first one holds the next token, the others are proposed."""
        ...

    def materialize(
        self, features: TensorValue, row_offsets: TensorValue, cache: PagedCacheValues
    ) -> None:
        """Writes the keys and values of tokens that it has not read.

        Args:
            features: `[U, F]`, the target's.
            row_offsets: uint32 `[B + 1]`.
            cache: the draft's cache.
        """
        ...

    def __call__(self, next_tokens: TensorValue, cache: PagedCacheValues) -> TensorValue:
        """Runs one block after the cached tokens; `[B, block_size - 1, H]`.

        Args:
            next_tokens: int64 `[B]`, the token after the cached ones.
            cache: the draft's cache as far as it is verified; the block's keys and values
                are written behind that and have no meaning afterwards.
        """
        ...


def block_step(
    target: Target, draft: BlockDraft, rule: AcceptanceRule, step: StepInputs
) -> StepOutputs:
    """Builds one step: merge, verify, accept, materialize, propose.

    Keys and values of rejected positions and of the block itself stay in the caches and
    are overwritten by the next step.
    """
    verified = verify(target, rule, step)
    accepted, wanted = verified.accepted, step.num_speculative_tokens

    def run(unread: Unread) -> list[TensorValue]:
        draft.materialize(unread.features, unread.row_offsets, unread.cache)
        lengths = verified.lengths
        block = grown_view(step.caches[1], lengths, draft.block_size)
        features = draft(accepted.next_tokens, block)
        where = positions(lengths.cast(DType.int64) + 1, features)  # [B, block_size - 1]
        proposal = propose(draft, features, where, step.sampling if step.draft_probs else None)
        return [first_columns(values, wanted) for values in proposal.values()]

    tokens, *probs = branch(step, verified, run, room_for_proposals(step).values())
    return StepOutputs(
        num_accepted_draft_tokens=accepted.num_accepted,
        next_tokens=accepted.next_tokens,
        next_draft_tokens=tokens,
        lengths=verified.lengths,
        logprobs=verified.logprobs,
        next_draft_probs=probs[0] if probs else None,
    )
