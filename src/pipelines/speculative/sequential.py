"""Drafts that propose one token after the other (EAGLE, MTP), and the step they are part of."""

from __future__ import annotations

from typing import Final, Protocol

from max.dtype import DType
from max.graph import DeviceRef, DimLike, TensorValue, ops
from max.nn.kv_cache import PagedCacheValues

from unispec.kv_cache.views import grown_view
from unispec.methods import LARGEST_DRAFT_TOKENS
from unispec.sampling.acceptance import AcceptanceRule

from .proposal import DraftVocabulary, Proposal, first_columns, propose
from .step import StepInputs, StepOutputs
from .verify import Target, Verified, verify

__all__ = ["SequentialDraft", "sequential_step"]

_MAX_DRAFT_TOKENS: Final = max(
    LARGEST_DRAFT_TOKENS[method] for method in ("eagle", "eagle3", "mtp")
)
"""Largest K; one graph proposes up to as many."""


class SequentialDraft(DraftVocabulary, Protocol):
    """A draft whose row i reads the token after position i and a feature of position i."""

    def from_target(self, features: TensorValue) -> TensorValue:
        """`[M, H]`, what the draft reads of the target's features `[M, F]`."""
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

    The draft first runs over the verified tokens with the target's own features,
    then over its own proposals, one a round. Rejected positions stay in both
    caches and are overwritten by the next step.
    """
    verified = verify(target, rule, step)
    _, draft_cache = step.caches
    features = draft(
        verified.shifted_tokens,
        draft.from_target(verified.features),
        verified.row_offsets,
        draft_cache,
    )
    feature = ops.gather(features, verified.last_verified, axis=0)  # [B, H]
    rounds = _Rounds(draft, step, verified)
    return rounds.loop(feature, rounds.propose(feature, verified.verified_lengths))


class _Rounds:
    """The rounds after the draft's prefill."""

    def __init__(self, draft: SequentialDraft, step: StepInputs, verified: Verified) -> None:
        self.draft = draft
        self.sampling = step.sampling if step.draft_probs else None
        self.wanted = step.num_speculative_tokens
        self.cache = step.caches[1]
        self.verified = verified
        self.device = step.tokens.device
        self.batch = step.draft_tokens.shape[0]

    def propose(self, feature: TensorValue, position: TensorValue) -> Proposal:
        """One token a row.

        Args:
            feature: `[B, H]`.
            position: uint32 `[B]`, the position of the last token that is settled.
        """
        where = ops.unsqueeze(position.cast(DType.int64) + 1, 1)  # [B, 1]
        return propose(self.draft, ops.unsqueeze(feature, 1), where, self.sampling)

    def loop(self, feature: TensorValue, first: Proposal) -> StepOutputs:
        """Runs the remaining rounds and packs the step's outputs."""
        one = ops.constant(1, DType.int64, device=DeviceRef.CPU())
        lengths = self.verified.verified_lengths
        tokens = ops.broadcast_to(first.tokens, [self.batch, _MAX_DRAFT_TOKENS])
        state = [one, ops.squeeze(first.tokens, 1), feature, lengths, tokens]
        if first.probs is not None:
            shape: list[DimLike] = [self.batch, _MAX_DRAFT_TOKENS, first.probs.shape[2]]
            state.append(ops.broadcast_to(first.probs, shape))
        wanted = self.wanted

        def unfinished(round_: TensorValue, *state: TensorValue) -> TensorValue:
            return round_ < wanted

        state = ops.while_loop(state, unfinished, self._round)
        accepted = self.verified.accepted
        return StepOutputs(
            num_accepted_draft_tokens=accepted.num_accepted,
            next_tokens=accepted.next_tokens,
            next_draft_tokens=first_columns(state[4], wanted),
            logprobs=self.verified.logprobs,
            next_draft_probs=first_columns(state[5], wanted) if first.probs is not None else None,
        )

    def _round(
        self,
        round_: TensorValue,
        token: TensorValue,
        feature: TensorValue,
        lengths: TensorValue,
        tokens: TensorValue,
        *all_probs: TensorValue,
    ) -> list[TensorValue]:
        """Proposes token number `round_` (0-based) of each row and puts it in its column."""
        width = self.batch + 1
        ramp = ops.range(0, width, 1, out_dim=width, dtype=DType.uint32, device=self.device)
        view = grown_view(self.cache, lengths, 1)
        feature = self.draft(token, feature, ramp, view).rebind(feature.shape)
        proposal = self.propose(feature, lengths + 1)
        columns = ops.range(
            0,
            _MAX_DRAFT_TOKENS,
            1,
            out_dim=_MAX_DRAFT_TOKENS,
            dtype=DType.int64,
            device=self.device,
        )
        here = ops.unsqueeze(columns == round_.to(self.device), 0)  # [1, 8]
        state = [
            round_ + 1,
            ops.squeeze(proposal.tokens, 1),
            feature,
            lengths + 1,
            ops.where(here, proposal.tokens, tokens),
        ]
        if proposal.probs is not None:
            state.append(ops.where(ops.unsqueeze(here, -1), proposal.probs, all_probs[0]))
        return state
