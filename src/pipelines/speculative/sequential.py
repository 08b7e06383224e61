"""Drafts that propose one token after the other (EAGLE, MTP), and the step they are part of."""

from __future__ import annotations

from typing import Protocol

from max.dtype import DType
from max.graph import DeviceRef, DimLike, TensorValue, ops
from max.nn.kv_cache import PagedCacheValues

from unispec.kv_cache.views import one_token_view
from unispec.sampling.acceptance import AcceptanceRule
from unispec.sampling.distribution import draw
from unispec.sampling.inputs import SamplingInputs
from unispec.sampling.seeds import Stream, uniform

from .step import MAX_DRAFT_TOKENS, StepInputs, StepOutputs
from .verify import Target, Verified, verify

__all__ = ["SequentialDraft", "sequential_step"]


class SequentialDraft(Protocol):
    """A draft whose row i reads the token after position i and a feature of position i."""

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
            features: `[T, H]`, the target's, or the draft's own where the target has none.
            row_offsets: uint32 `[B + 1]`.
            cache: the draft's cache.
        """
        ...

    def logits(self, features: TensorValue) -> TensorValue:
        """float32 `[B, N]` over the draft's own vocabulary."""
        ...

    def target_ids(self, draft_ids: TensorValue) -> TensorValue:
        """Target token ids of the draft's token ids, both int64 `[B]`."""
        ...

    def target_probs(self, probs: TensorValue) -> TensorValue:
        """Spreads float32 `[B, N]` over the target's vocabulary: `[B, V]`."""
        ...


def sequential_step(
    target: Target, draft: SequentialDraft, rule: AcceptanceRule, step: StepInputs
) -> StepOutputs:
    """Builds one step: merge, verify, accept, shift, propose.

    The draft first runs over the verified tokens with the target's own features,
    then over its own proposals, one a round. Rejected positions stay in both
    caches and are overwritten by the next step.

    Args:
        target: the target stack.
        draft: the draft stack; its cache is `step.caches[1]`.
        rule: the acceptance rule.
        step: the step's inputs.
    """
    verified = verify(target, rule, step)
    _, draft_cache = step.caches
    features = draft(verified.shifted_tokens, verified.features, verified.row_offsets, draft_cache)
    feature = ops.gather(features, verified.last_verified, axis=0)  # [B, H]
    propose = _Proposer(draft, step, verified)
    token, probs = propose.choose(feature, verified.verified_lengths)
    return propose.loop(token, feature, probs)


class _Proposer:
    """The rounds after the draft's prefill."""

    def __init__(self, draft: SequentialDraft, step: StepInputs, verified: Verified) -> None:
        self.draft = draft
        self.sampling: SamplingInputs | None = step.sampling if step.draft_probs else None
        self.wanted = step.num_speculative_tokens
        self.cache = step.caches[1]
        self.verified = verified
        self.device = step.tokens.device
        self.batch = step.draft_tokens.shape[0]

    def choose(
        self, feature: TensorValue, position: TensorValue
    ) -> tuple[TensorValue, TensorValue | None]:
        """The proposed token, int64 `[B]`, and for sampled drafts its distribution `[B, V]`.

        Args:
            feature: `[B, H]`.
            position: uint32 `[B]`, the position of the last token that is settled.
        """
        logits = self.draft.logits(feature)  # [B, N]
        best = ops.squeeze(ops.argmax(logits, axis=-1), -1)
        if self.sampling is None:
            return self.draft.target_ids(best), None
        temperature = ops.unsqueeze(self.sampling.temperature, 1)  # [B, 1]
        greedy = temperature <= 0
        one = ops.constant(1.0, DType.float32, device=self.device)
        width = logits.shape[1]
        ids = ops.range(0, width, 1, out_dim=width, dtype=DType.int64, device=self.device)
        one_hot = (ids == ops.unsqueeze(best, 1)).cast(DType.float32)
        soft = ops.softmax(logits / ops.where(greedy, one, temperature))
        probs = ops.where(greedy, one_hot, soft)  # [B, N]
        where = ops.unsqueeze(position.cast(DType.int64) + 1, 1)  # [B, 1]
        coin = uniform(self.sampling.seed, where, Stream.DRAFT)
        sampled = ops.squeeze(draw(ops.unsqueeze(probs, 1), coin), 1)
        return self.draft.target_ids(sampled), self.draft.target_probs(probs)

    def loop(
        self, token: TensorValue, feature: TensorValue, probs: TensorValue | None
    ) -> StepOutputs:
        """Runs the remaining rounds and packs the step's outputs."""
        first = ops.constant(1, DType.int64, device=DeviceRef.CPU())
        lengths = self.verified.verified_lengths
        tokens = ops.broadcast_to(ops.unsqueeze(token, 1), [self.batch, MAX_DRAFT_TOKENS])
        state = [first, token, feature, lengths, tokens]
        if probs is not None:
            shape: list[DimLike] = [self.batch, MAX_DRAFT_TOKENS, probs.shape[1]]
            state.append(ops.broadcast_to(ops.unsqueeze(probs, 1), shape))
        wanted = self.wanted

        def unfinished(round_: TensorValue, *state: TensorValue) -> TensorValue:
            return round_ < wanted

        state = ops.while_loop(state, unfinished, self._round)
        accepted = self.verified.accepted
        return StepOutputs(
            num_accepted_draft_tokens=accepted.num_accepted,
            next_tokens=accepted.next_tokens,
            next_draft_tokens=_first_columns(state[4], wanted),
            next_draft_probs=_first_columns(state[5], wanted) if probs is not None else None,
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
        view = one_token_view(self.cache, lengths)
        feature = self.draft(token, feature, ramp, view).rebind(feature.shape)
        token, probs = self.choose(feature, lengths + 1)
        columns = ops.range(
            0, MAX_DRAFT_TOKENS, 1, out_dim=MAX_DRAFT_TOKENS, dtype=DType.int64, device=self.device
        )
        here = ops.unsqueeze(columns == round_.to(self.device), 0)  # [1, 8]
        state = [
            round_ + 1,
            token,
            feature,
            lengths + 1,
            ops.where(here, ops.unsqueeze(token, 1), tokens),
        ]
        if probs is not None:
            here = ops.unsqueeze(here, -1)
            state.append(ops.where(here, ops.unsqueeze(probs, 1), all_probs[0]))
        return state


def _first_columns(values: TensorValue, count: TensorValue) -> TensorValue:
    """`values[:, :count]` with the dimension `num_proposed`."""
    return ops.slice_tensor(values, [slice(None), (slice(0, count), "num_proposed")])
