"""Acceptance rules: which draft tokens stand, and which token follows the last one that stands.

Every rule takes the shaped logits of K + 1 positions and K draft tokens, and
returns `Accepted`. `Matching` and `Rejection` emit exactly the target
distribution; `Relaxed` and `Synthetic` do not and are named lossy.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from max.dtype import DType
from max.graph import TensorValue, ops

from .branch import replace_if
from .distribution import draw, shape_logits, target_distribution
from .inputs import SamplingInputs
from .seeds import Stream, positions, uniform

__all__ = [
    "AcceptanceRule",
    "Accepted",
    "Matching",
    "Rejection",
    "Relaxed",
    "Synthetic",
    "Verification",
]


@dataclass(frozen=True)
class Verification:
    """What a rule decides on."""

    logits: TensorValue
    """float32 `[B, K + 1, V]`: raw target logits; position j follows the first j drafts."""
    draft_tokens: TensorValue
    """int64 `[B, K]`; -1 is a void draft, which no rule accepts."""
    first_position: TensorValue
    """int64 `[B]`: absolute position of the token that position 0 decides."""
    draft_probs: TensorValue | None = None
    """float32 `[B, K, V]`: the distributions the drafts were sampled from (`Rejection` only)."""
    in_thinking_phase: TensorValue | None = None
    """bool `[B]`: whether the row is inside a thinking block (`Relaxed` only)."""


@dataclass(frozen=True)
class Accepted:
    """The verdict of one step."""

    num_accepted: TensorValue
    """int64 `[B]`: length of the accepted run, 0 to K."""
    next_tokens: TensorValue
    """int64 `[B]`: the token after the accepted run."""
    tokens: TensorValue
    """int64 `[B, K + 1]`: accepted drafts, then the next token; what follows has no meaning."""


class AcceptanceRule(Protocol):
    """Decides which draft tokens stand."""

    def __call__(self, step: Verification, sampling: SamplingInputs) -> Accepted:
        """Returns the verdict of one step."""
        ...


class Matching:
    """For drafts without a distribution: accept while the draft is what the target draws.

    The target's token is drawn once per position, and the draft only says
    whether the next position is valid, so the output is the target's own
    sample whatever the draft is. Greedy rows draw their argmax.
    """

    def __call__(self, step: Verification, sampling: SamplingInputs) -> Accepted:
        """Returns the verdict of one step."""
        tokens = target_tokens(step, sampling)
        return accept_run(step.draft_tokens == tokens[:, :-1], step.draft_tokens, tokens)


class Rejection:
    """For sampled drafts: accept with min(1, p / q), else draw from max(p - q, 0).

    Leviathan et al. 2023 (arXiv 2211.17192), algorithm 1; Chen et al. 2023.
    """

    def __call__(self, step: Verification, sampling: SamplingInputs) -> Accepted:
        """Returns the verdict of one step.

        Raises:
            ValueError: `draft_probs` is missing.
        """
        if step.draft_probs is None:
            raise ValueError("Rejection needs draft_probs; use Matching for one-hot drafts")
        draft = step.draft_tokens
        shaped = shape_logits(step.logits, draft, sampling)
        weights = target_distribution(shaped, sampling)
        total = ops.sum(weights.cast(DType.float64), axis=-1)
        p = weights / total.cast(DType.float32)  # [B, K + 1, V]
        void = ops.unsqueeze(draft < 0, -1)
        zero = ops.constant(0.0, DType.float32, device=p.device)
        q = ops.where(void, zero, step.draft_probs)  # [B, K, V]
        p_verified = ops.rebind(p[:, :-1], q.shape)

        where = positions(step.first_position, p)  # [B, K + 1]
        coin = uniform(sampling.seed, where[:, :-1], Stream.ACCEPT).reshape(draft.shape)
        chosen = _one_hot(draft, p)
        p_draft = ops.squeeze(ops.sum(p_verified * chosen, axis=-1), -1)  # [B, K]
        q_draft = ops.squeeze(ops.sum(q * chosen, axis=-1), -1)
        stands = coin * q_draft.cast(DType.float64) < p_draft.cast(DType.float64)
        accepted = ops.logical_and(draft >= 0, stands)

        excess = ops.max(p_verified - q, zero)
        # p == q leaves nothing; then every draw is accepted up to rounding, and p itself is right.
        residual = ops.where(ops.sum(excess, axis=-1) > 0, excess, p_verified)
        weights = ops.concat([residual, p[:, -1:]], axis=1).rebind(p.shape)
        tokens = draw(weights, uniform(sampling.seed, where, Stream.TOKEN))
        return accept_run(accepted, draft, tokens)


@dataclass(frozen=True)
class Relaxed:
    """Lossy: inside a thinking block a draft near the top of the target also stands.

    A draft is accepted when it is among the `top_n` most probable tokens and its
    probability is at least that of the best one less `delta`. These probabilities are
    before temperature, top-k, top-p and min-p. Rows outside a thinking block follow
    `Matching`.
    """

    top_n: int
    """How many of the most probable tokens stand."""
    delta: float
    """How far below the best probability, 0 to 1, one that stands may be."""

    def __call__(self, step: Verification, sampling: SamplingInputs) -> Accepted:
        """Returns the verdict of one step.

        Raises:
            ValueError: `in_thinking_phase` is missing.
        """
        if step.in_thinking_phase is None:
            raise ValueError("Relaxed needs in_thinking_phase")
        draft = step.draft_tokens
        tokens = target_tokens(step, sampling)
        p = ops.softmax(shape_logits(step.logits, draft, sampling)[:, :-1])  # [B, K, V]
        p = ops.rebind(p, [*draft.shape, step.logits.shape[2]])
        p_draft = ops.sum(p * _one_hot(draft, p), axis=-1)  # [B, K, 1]
        better = ops.squeeze(ops.sum((p > p_draft).cast(DType.int32), axis=-1), -1)
        close = ops.squeeze(p_draft >= ops.max(p, axis=-1) - self.delta, -1)
        near = ops.logical_and(better < self.top_n, close)
        near = ops.logical_and(near, ops.logical_and(p_draft.reshape(draft.shape) > 0, draft >= 0))
        relaxed = ops.logical_and(near, ops.unsqueeze(step.in_thinking_phase, 1))
        return accept_run(ops.logical_or(draft == tokens[:, :-1], relaxed), draft, tokens)


@dataclass(frozen=True)
class Synthetic:
    """Lossy, for benchmarks: accept each draft with a fixed probability, whatever it is."""

    rate: float
    """Probability, 0 to 1, with which each draft is accepted."""

    def __call__(self, step: Verification, sampling: SamplingInputs) -> Accepted:
        """Returns the verdict of one step."""
        draft = step.draft_tokens
        tokens = target_tokens(step, sampling)
        where = positions(step.first_position, tokens)[:, :-1]
        coin = uniform(sampling.seed, where, Stream.ACCEPT).reshape(draft.shape)
        return accept_run(ops.logical_and(draft >= 0, coin < self.rate), draft, tokens)


def target_tokens(step: Verification, sampling: SamplingInputs) -> TensorValue:
    """The target's own token at every position: int64 `[B, K + 1]`."""
    shaped = shape_logits(step.logits, step.draft_tokens, sampling)

    def drawn(_: TensorValue) -> TensorValue:
        weights = target_distribution(shaped, sampling)
        where = positions(step.first_position, weights)
        return draw(weights, uniform(sampling.seed, where, Stream.TOKEN))

    best = ops.squeeze(ops.argmax(shaped, axis=-1), -1)
    return replace_if(sampling.max_temperature > 0, best, drawn)


def accept_run(accepted: TensorValue, draft_tokens: TensorValue, tokens: TensorValue) -> Accepted:
    """Cuts at the first draft that does not stand.

    Args:
        accepted: bool `[B, K]`.
        draft_tokens: int64 `[B, K]`.
        tokens: int64 `[B, K + 1]`, the token to emit where the draft does not stand.
    """
    batch, positions_ = tokens.shape
    # A run survives up to position j if no draft up to j was refused.
    refused = ops.cumsum(ops.logical_not(accepted).cast(DType.int64), axis=1)
    standing = refused == 0  # [B, K]
    num_accepted = ops.squeeze(ops.sum(standing.cast(DType.int64), axis=-1), -1)  # [B]
    kept = ops.where(standing, draft_tokens, tokens[:, :-1])
    emitted = ops.concat([kept, tokens[:, -1:]], axis=1).rebind([batch, positions_])
    next_tokens = ops.gather_nd(emitted, ops.unsqueeze(num_accepted, -1), batch_dims=1)
    return Accepted(num_accepted, next_tokens, emitted)


def _one_hot(tokens: TensorValue, like: TensorValue) -> TensorValue:
    """float32 `[B, K, V]`; all zero for a void token."""
    vocab = like.shape[2]
    ids = ops.range(0, vocab, 1, out_dim=vocab, dtype=DType.int64, device=tokens.device)
    return (ops.unsqueeze(tokens, -1) == ids).cast(DType.float32)
