"""Drafts that propose one token after the other (EAGLE, MTP), and the step they are part of."""

from __future__ import annotations

from typing import Protocol

from max.dtype import DType
from max.graph import DeviceRef, Dim, TensorValue, ops
from max.nn.kv_cache import PagedCacheValues

from unispec.kv_cache.views import grown_view
from unispec.sampling.acceptance import AcceptanceRule

from .deferred import Unread
from .proposal import DraftVocabulary, Proposal, no_proposal, propose
from .step import VOID_TOKEN, StepInputs, StepOutputs
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

    def __call__(
        self,
        tokens: TensorValue,
        features: TensorValue,
        row_offsets: TensorValue,
        cache: PagedCacheValues,
    ) -> TensorValue:
        """Writes the rows' keys and values; returns `[T, H]`, features for the next rows.

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
    """Builds one step: merge, verify, accept, shift, propose.

    The draft first runs over the verified tokens that it has not read, with the target's own
    features, then over its own proposals, one a round. Rejected positions stay in both
    caches and are overwritten by the next step.
    """
    verified = verify(target, rule, step)
    rounds = _Rounds(draft, step, verified.features.dtype)

    def run(unread: Unread) -> list[TensorValue]:
        features = draft(
            unread.tokens, draft.from_target(unread.features), unread.row_offsets, unread.cache
        )
        feature = ops.gather(features, unread.last_verified, axis=0)  # [B, H]
        return rounds.first(feature, verified.lengths)

    _, _, _, tokens, *probs = rounds.loop(branch(step, verified, run, rounds.nothing))
    return StepOutputs(
        num_accepted_draft_tokens=verified.accepted.num_accepted,
        next_tokens=verified.accepted.next_tokens,
        next_draft_tokens=tokens,
        logprobs=verified.logprobs,
        next_draft_probs=probs[0] if probs else None,
    )


class _Rounds:
    """The rounds after the draft's prefill. P tokens to propose.

    Their state is the length of each row so far, uint32 `[B]`, its last proposed token, int64
    `[B]`, the feature that it was proposed from, `[B, H]`, all proposed tokens, int64 `[B, P]`, and
    for sampled drafts what they were drawn from, float32 `[B, P, V]`.
    """

    def __init__(self, draft: SequentialDraft, step: StepInputs, dtype: DType) -> None:
        self.draft = draft
        self.step = step
        self.sampling = step.sampling if step.draft_probs else None
        self.dtype = dtype
        self.device = step.tokens.device
        self.batch = step.draft_tokens.shape[0]
        wanted, count = step.num_speculative_tokens, Dim("num_proposed")
        self.columns = ops.range(
            0, wanted, 1, out_dim=count, dtype=DType.int64, device=self.device
        )  # [P]

    def propose(self, feature: TensorValue, position: TensorValue) -> Proposal:
        """One token a row.

        Args:
            feature: `[B, H]`.
            position: uint32 `[B]`, the position of the last token that is settled.
        """
        where = ops.unsqueeze(position.cast(DType.int64) + 1, 1)  # [B, 1]
        return propose(self.draft, ops.unsqueeze(feature, 1), where, self.sampling)

    def first(self, feature: TensorValue, lengths: TensorValue) -> list[TensorValue]:
        """The state after the first token of each row, which stands in all columns for now."""
        proposal, count = self.propose(feature, lengths), self.columns.shape[0]
        columns = [
            ops.broadcast_to(values, [self.batch, count, *values.shape[2:]])
            for values in proposal.values()
        ]
        return [lengths, ops.squeeze(proposal.tokens, 1), feature, *columns]

    def nothing(self) -> list[TensorValue]:
        """The state where nothing is proposed."""
        zero = ops.constant(0, self.dtype, device=self.device)
        feature = ops.broadcast_to(zero, [self.batch, self.draft.hidden_size])
        no_token = ops.constant(VOID_TOKEN, DType.int64, device=self.device)
        return [
            self.step.caches[1].cache_lengths,
            ops.broadcast_to(no_token, [self.batch]),
            feature,
            *no_proposal(self.step).values(),
        ]

    def loop(self, state: list[TensorValue]) -> list[TensorValue]:
        """Runs the remaining rounds: the state after them."""
        one = ops.constant(1, DType.int64, device=DeviceRef.CPU())
        wanted = self.step.num_speculative_tokens

        def unfinished(round_: TensorValue, *state: TensorValue) -> TensorValue:
            return round_ < wanted

        _, *state = ops.while_loop([one, *state], unfinished, self._round)
        return state

    def _round(
        self,
        round_: TensorValue,
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
        proposal = self.propose(feature, lengths + 1)
        here = ops.unsqueeze(self.columns == round_.to(self.device), 0)  # [1, P]
        state = [
            round_ + 1,
            lengths + 1,
            ops.squeeze(proposal.tokens, 1),
            feature,
            ops.where(here, proposal.tokens, tokens),
        ]
        if proposal.probs is not None:
            state.append(ops.where(ops.unsqueeze(here, -1), proposal.probs, all_probs[0]))
        return state
