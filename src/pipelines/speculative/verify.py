"""The first half of every step: merge, verify, accept. Sequential and block drafts share it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from max.dtype import DType
from max.graph import Dim, TensorValue, ops
from max.nn.kernels import merge_ragged_tensors
from max.nn.kv_cache import PagedCacheValues

from unispec.sampling.acceptance import AcceptanceRule, Accepted, Verification
from unispec.sampling.branch import run_if
from unispec.sampling.logprobs import Logprobs, find_logprobs

from .deferred import Unread
from .step import StepInputs

__all__ = ["Target", "Verified", "branch", "verify"]


class Target(Protocol):
    """A target that can verify draft tokens."""

    def __call__(
        self, tokens: TensorValue, row_offsets: TensorValue, cache: PagedCacheValues
    ) -> tuple[TensorValue, TensorValue]:
        """Runs the target over ragged rows and writes their keys and values.

        Args:
            tokens: int64 `[T]`.
            row_offsets: uint32 `[B + 1]`.
            cache: the target's cache.

        Returns:
            `[T, H]`, what the head reads, and `[T, F]`, the features that the draft reads.
        """
        ...

    def logits(self, hidden: TensorValue) -> TensorValue:
        """float32 `[R, V]` for hidden states `[R, H]`."""
        ...


@dataclass(frozen=True)
class Verified:
    """A step after acceptance. M = T + B * K merged tokens."""

    row_offsets: TensorValue
    """uint32 `[B + 1]`: where each row starts among the merged tokens."""
    features: TensorValue
    """`[M, F]`: what the draft reads of the merged tokens."""
    new_tokens: TensorValue
    """int64 `[B]`: merged tokens of each row, drafts not counted."""
    first_position: TensorValue
    """int64 `[B]`: of each row's first draft, or of its next token."""
    accepted: Accepted
    """The rule's verdict."""
    logprobs: Logprobs
    """Of `accepted.tokens`, J = K + 1 positions a row, where the batch asks for them."""

    @property
    def lengths(self) -> TensorValue:
        """uint32 `[B]`: verified tokens of each row, the next token not counted."""
        return (self.first_position + self.accepted.num_accepted).cast(DType.uint32)


def verify(target: Target, rule: AcceptanceRule, step: StepInputs) -> Verified:
    """Runs the target over new and draft tokens at once and decides which drafts stand."""
    batch, num_drafts = step.draft_tokens.shape
    cache = step.caches[0]
    tokens, row_offsets = _merge(step, ops.max(step.draft_tokens, 0))
    hidden, features = target(tokens, row_offsets, cache)  # [M, H] and [M, F]

    ends = ops.rebind(row_offsets[1:], [batch]).cast(DType.int64)
    starts = ops.rebind(row_offsets[:-1], [batch]).cast(DType.int64)
    count = num_drafts + 1
    first_row = ops.unsqueeze(ends - _scalar_dim(step, count), 1)  # [B, 1]
    ramp = ops.range(0, count, 1, out_dim=count, dtype=DType.int64, device=step.tokens.device)
    rows = (first_row + ops.unsqueeze(ramp, 0)).reshape([batch * count])
    logits = target.logits(ops.gather(hidden, rows, axis=0))  # [B * (K + 1), V]
    logits = logits.reshape([batch, count, logits.shape[1]])

    new_tokens = ends - starts - _scalar_dim(step, num_drafts)  # [B], without drafts
    first_position = cache.cache_lengths.cast(DType.int64) + new_tokens
    accepted = rule(
        Verification(
            logits=logits,
            draft_tokens=step.draft_tokens,
            first_position=first_position,
            draft_probs=step.draft_probs,
            in_thinking_phase=step.in_thinking_phase,
        ),
        step.sampling,
    )
    accepted = _follow_prompt(accepted, step.known_next_tokens)
    return Verified(
        row_offsets=row_offsets,
        features=features,
        new_tokens=new_tokens,
        first_position=first_position,
        accepted=accepted,
        logprobs=find_logprobs(logits, accepted.tokens, step.sampling.num_logprobs),
    )


def branch(
    step: StepInputs,
    verified: Verified,
    run: Callable[[Unread], Sequence[TensorValue]],
    otherwise: Sequence[TensorValue],
) -> list[TensorValue]:
    """The draft's part over what it has not read, in a step that does not log that for later.

    In a graph without deferred inputs it reads in each step.

    Args:
        run: builds the draft's part, and is called inside the branch.
        otherwise: what stands in for what it gives, of the same types.
    """
    deferred = step.deferred
    if deferred is None:
        return list(run(_merged(step, verified)))
    deferred.write(verified.features)
    return run_if(
        deferred.reads,
        otherwise,
        lambda *_: run(deferred.before(_merged(step, verified))),
    )


def _merged(step: StepInputs, verified: Verified) -> Unread:
    """The merged positions as the draft reads them."""
    offsets, accepted = verified.row_offsets, verified.accepted
    starts = ops.rebind(offsets[:-1], verified.new_tokens.shape).cast(DType.int64)
    return Unread(
        # What stands after the next token of a row has no meaning.
        tokens=_shift(step, accepted, offsets),
        features=verified.features,
        row_offsets=offsets,
        last_verified=starts + verified.new_tokens - 1 + accepted.num_accepted,
        cache=step.caches[1],
    )


def _merge(step: StepInputs, drafts: TensorValue) -> tuple[TensorValue, TensorValue]:
    """Appends each row's drafts to its new tokens: int64 `[M]` and uint32 `[B + 1]`."""
    batch, num_drafts = drafts.shape
    device = drafts.device
    width = batch + 1
    ramp = ops.range(0, width, 1, out_dim=width, dtype=DType.int64, device=device)
    draft_offsets = (ramp * _scalar_dim(step, num_drafts)).cast(DType.uint32)
    tokens, row_offsets = merge_ragged_tensors(
        step.tokens,
        ops.rebind(step.row_offsets, [width]),
        drafts.reshape([batch * num_drafts]),
        draft_offsets,
    )
    # Plain names: a layer that is compiled once takes no computed dimensions.
    return ops.rebind(tokens, ["num_merged"]), ops.rebind(row_offsets, ["num_row_offsets"])


def _shift(step: StepInputs, accepted: Accepted, row_offsets: TensorValue) -> TensorValue:
    """The verified successor of every merged token: int64 `[M]`."""
    corrected, _ = _merge(step, accepted.tokens[:, :-1].rebind(step.draft_tokens.shape))
    moved = ops.concat([corrected[1:], corrected[:1]])  # right everywhere but at row ends
    ends = (row_offsets[1:] - 1).cast(DType.int64)
    final = accepted.tokens[:, -1]
    return ops.scatter_nd(
        moved.rebind(corrected.shape), final.rebind([ends.shape[0]]), ops.unsqueeze(ends, 1)
    )


def _follow_prompt(accepted: Accepted, known: TensorValue) -> Accepted:
    """Puts the prompt's own next token where a row is still in prefill."""
    first = ops.where(known >= 0, known, accepted.tokens[:, 0])  # [B]
    tokens = ops.concat([ops.unsqueeze(first, 1), accepted.tokens[:, 1:]], axis=1)
    return Accepted(
        num_accepted=accepted.num_accepted,
        next_tokens=ops.where(known >= 0, known, accepted.next_tokens),
        tokens=tokens.rebind(accepted.tokens.shape),
    )


def _scalar_dim(step: StepInputs, dim: Dim) -> TensorValue:
    """A dimension as an int64 `[1]` tensor, made on the step's device: nothing is copied to it."""
    device = step.tokens.device
    return ops.range(dim, dim + 1, 1, out_dim=1, dtype=DType.int64, device=device)
