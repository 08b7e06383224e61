"""Drafts that propose one token after the other (EAGLE, MTP), and the step they are part of."""

from __future__ import annotations

from typing import Protocol

from max.dtype import DType
from max.graph import DeviceRef, Dim, TensorValue, ops
from max.nn.kv_cache import PagedCacheValues

from unispec.kv_cache.views import grown_view
from unispec.sampling.acceptance import AcceptanceRule

from .deferred import Unread
from .proposal import DraftVocabulary, Proposal, propose, room_for_proposals
from .step import StepInputs, StepOutputs
from .verify import Target, branch, verify

__all__ = ["SequentialDraft", "sequential_step"]


class SequentialDraft(DraftVocabulary, Protocol):
    """A draft whose row i reads the token after position i and a feature of position i."""

    @property
    def hidden_size(self) -> int:
        """H, the width of the features that it puts out."""
        ...

    def from_target(self, features: TensorValue) -> TensorValue:
        """`[U, H]`, what the draft reads of the target's features `[U, F]`."""
        ...

    def read(
        self,
        tokens: TensorValue,
        features: TensorValue,
        row_offsets: TensorValue,
        cache: PagedCacheValues,
    ) -> None:
        """Writes the rows' cache entries as a call would; nobody needs what it would return.

        Args:
            tokens: int64 `[U]`, the token after each position.
            features: `[U, H]`, of `from_target`.
            row_offsets: uint32 `[B + 1]`.
            cache: the draft's cache.
        """
        ...

    def __call__(
        self,
        tokens: TensorValue,
        features: TensorValue,
        row_offsets: TensorValue,
        cache: PagedCacheValues,
    ) -> TensorValue:
        """Writes the rows' cache entries; returns `[T, H]`, features for the next rows.

        Args:
            tokens: int64 `[T]`, the token after each position.
            features: `[T, H]`, of `from_target`, or the draft's own where the target has none.
            row_offsets: uint32 `[B + 1]`.
            cache: the draft's cache.
        """
        ...


def sequential_step(
    target: Target, draft: SequentialDraft, rule: AcceptanceRule, step: StepInputs
) -> StepOutputs:
    """Builds one step: merge, verify, accept, read, propose.

    The draft reads the verified tokens that it has not read, with the target's features. Then each
    round proposes a token: the first one from the last verified position, with the target's
    feature of it, the others from the draft's own. Rejected positions stay in both caches and are
    overwritten by the next step.
    """
    verified = verify(target, rule, step)

    def read(unread: Unread) -> list[TensorValue]:
        features = draft.from_target(unread.features)
        draft.read(unread.tokens, features, unread.row_offsets, unread.cache)
        return [ops.gather(features, unread.last_verified, axis=0)]  # [B, H]

    zero = ops.constant(0, verified.features.dtype, device=step.tokens.device)
    nothing = ops.broadcast_to(zero, [step.draft_tokens.shape[0], draft.hidden_size])
    (feature,) = branch(step, verified, read, [nothing])
    accepted = verified.accepted
    tokens, *probs = _Rounds(draft, step).run(verified.lengths - 1, accepted.next_tokens, feature)
    return StepOutputs(
        num_accepted_draft_tokens=accepted.num_accepted,
        next_tokens=accepted.next_tokens,
        next_draft_tokens=tokens,
        lengths=verified.lengths,
        logprobs=verified.logprobs,
        next_draft_probs=probs[0] if probs else None,
    )


class _Rounds:
    """The rounds of a draft, each of which proposes one token a row. P tokens to propose.

    Their state is the round's number, on the host and int64 `[1]` on the device, where the draft
    goes on in each row, uint32 `[B]`, the token after that position, int64 `[B]`, the feature of
    it, `[B, H]`, all proposed tokens, int64 `[B, P]`, and for sampled drafts what they were drawn
    from, float32 `[B, P, V]`.
    """

    def __init__(self, draft: SequentialDraft, step: StepInputs) -> None:
        self.draft = draft
        self.step = step
        self.sampling = step.sampling if step.draft_probs else None
        self.device = step.tokens.device
        self.batch = step.draft_tokens.shape[0]
        wanted, count = step.num_speculative_tokens, Dim("num_proposed")
        self.columns = ops.range(
            0, wanted, 1, out_dim=count, dtype=DType.int64, device=self.device
        )  # [P]

    def run(
        self, lengths: TensorValue, token: TensorValue, feature: TensorValue
    ) -> list[TensorValue]:
        """All proposed tokens, and their probabilities where they are sampled.

        Args:
            lengths: uint32 `[B]`, positions before the last verified one.
            token: int64 `[B]`, the one after it.
            feature: `[B, H]`, the target's, of it.
        """
        zero = ops.constant(0, DType.int64, device=DeviceRef.CPU())
        first = ops.constant([0], DType.int64, device=self.device)
        wanted = self.step.num_speculative_tokens
        proposed = room_for_proposals(self.step).values()

        def unfinished(round_: TensorValue, *state: TensorValue) -> TensorValue:
            return round_ < wanted

        _, _, _, _, _, *proposed = ops.while_loop(
            [zero, first, lengths, token, feature, *proposed], unfinished, self._round
        )
        return proposed

    def _propose(self, feature: TensorValue, position: TensorValue) -> Proposal:
        """One token a row.

        Args:
            feature: `[B, H]`.
            position: uint32 `[B]`, of the token that was read last.
        """
        where = ops.unsqueeze(position.cast(DType.int64) + 1, 1)  # [B, 1]
        return propose(self.draft, ops.unsqueeze(feature, 1), where, self.sampling)

    def _round(
        self,
        round_: TensorValue,
        column: TensorValue,
        lengths: TensorValue,
        token: TensorValue,
        feature: TensorValue,
        tokens: TensorValue,
        *all_probs: TensorValue,
    ) -> list[TensorValue]:
        """Proposes token number `round_` (0-based) of each row and puts it in its column."""
        width = self.batch + 1
        ramp = ops.range(0, width, 1, out_dim=width, dtype=DType.uint32, device=self.device)
        view = grown_view(self.step.caches[1], lengths, 1)
        feature = self.draft(token, feature, ramp, view).rebind(feature.shape)
        proposal = self._propose(feature, lengths + 1)
        here = ops.unsqueeze(self.columns == column, 0)  # [1, P]
        state = [
            round_ + 1,
            column + 1,
            lengths + 1,
            ops.squeeze(proposal.tokens, 1),
            feature,
            ops.where(here, proposal.tokens, tokens),
        ]
        if proposal.probs is not None:
            state.append(ops.where(ops.unsqueeze(here, -1), proposal.probs, all_probs[0]))
        return state
