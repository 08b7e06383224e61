"""From a draft's features to proposed tokens; sequential and block drafts share it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from max.dtype import DType
from max.graph import Dim, TensorValue, ops

from unispec.sampling.distribution import draw
from unispec.sampling.inputs import SamplingInputs
from unispec.sampling.seeds import Stream, uniform

from .step import StepInputs

__all__ = ["DraftVocabulary", "Proposal", "first_columns", "propose", "room_for_proposals"]


class DraftVocabulary(Protocol):
    """A draft's head. N tokens that it can propose, V in the target's vocabulary."""

    def logits(self, features: TensorValue) -> TensorValue:
        """float32 `[..., N]` over the draft's own vocabulary for features `[..., H]`."""
        ...

    def target_ids(self, draft_ids: TensorValue) -> TensorValue:
        """Target token ids of the draft's token ids, int64 of any shape."""
        ...

    def target_probs(self, probs: TensorValue) -> TensorValue:
        """Spreads float32 `[..., N]` over the target's vocabulary: `[..., V]`."""
        ...


@dataclass(frozen=True)
class Proposal:
    """J proposed tokens a row."""

    tokens: TensorValue
    """int64 `[B, J]`."""
    probs: TensorValue | None
    """float32 `[B, J, V]`: what sampled tokens were drawn from."""

    def values(self) -> list[TensorValue]:
        """The tokens, then the probabilities where there are some."""
        return [self.tokens] if self.probs is None else [self.tokens, self.probs]


def propose(
    draft: DraftVocabulary,
    features: TensorValue,
    positions: TensorValue,
    sampling: SamplingInputs | None,
) -> Proposal:
    """Proposes the draft's best token at each position, or a sample where it is asked for.

    A sample is drawn at the request's temperature alone: acceptance compares the
    distributions, so top-k and the like need not be followed.

    Args:
        features: `[B, J, H]`.
        positions: int64 `[B, J]`, absolute positions of the proposed tokens.
        sampling: for sampled drafts, the batch's parameters.
    """
    logits = draft.logits(features)  # [B, J, N]
    best = ops.squeeze(ops.argmax(logits, axis=-1), -1)  # [B, J]
    if sampling is None:
        return Proposal(draft.target_ids(best), None)
    temperature = sampling.temperature.reshape([features.shape[0], 1, 1])
    greedy = temperature <= 0
    one = ops.constant(1.0, DType.float32, device=logits.device)
    width = logits.shape[2]
    ids = ops.range(0, width, 1, out_dim=width, dtype=DType.int64, device=logits.device)
    one_hot = (ids == ops.unsqueeze(best, -1)).cast(DType.float32)
    soft = ops.softmax(logits / ops.where(greedy, one, temperature))
    probs = ops.where(greedy, one_hot, soft)  # [B, J, N]
    sampled = draw(probs, uniform(sampling.seed, positions, Stream.DRAFT))
    return Proposal(draft.target_ids(sampled), draft.target_probs(probs))


def room_for_proposals(step: StepInputs) -> Proposal:
    """Room for the proposals of a step, J = `num_proposed`, before a draft has made any.

    J is 0 where none is wanted.
    """
    batch, device = step.draft_tokens.shape[0], step.tokens.device
    wanted, count = step.num_speculative_tokens, Dim("num_proposed")
    tokens = ops.unsqueeze(
        ops.range(0, wanted, 1, out_dim=count, dtype=DType.int64, device=device), 0
    )
    probs = None
    if step.draft_probs is not None:
        zero = ops.constant(0.0, DType.float32, device=device)
        probs = ops.broadcast_to(zero, [batch, count, step.draft_probs.shape[2]])
    return Proposal(ops.broadcast_to(tokens, [batch, count]), probs)


def first_columns(values: TensorValue, count: TensorValue) -> TensorValue:
    """`values[:, :count]` with the dimension `num_proposed`.

    Args:
        values: `[B, J, ...]`.
        count: int64 scalar on the CPU.
    """
    return ops.slice_tensor(values, [slice(None), (slice(0, count), "num_proposed")])
