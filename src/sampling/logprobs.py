"""Log probabilities of the tokens that a step emits, and of the most probable ones."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from max.dtype import DType
from max.graph import DeviceRef, TensorValue, ops

from .branch import run_if
from .ranges import LOGPROBS

__all__ = ["Logprobs", "find_logprobs"]

_WIDTH: Final = int(LOGPROBS.high)
"""Columns of the most probable tokens, 20."""


@dataclass(frozen=True)
class Logprobs:
    """Natural logarithms of probabilities; nothing in it has a meaning where nobody asks."""

    tokens: TensorValue
    """float32 `[B, J]`: of the token at each position."""
    top_tokens: TensorValue
    """int64 `[B, J, 20]`: the most probable tokens of each position, the best one first, as many as
    the batch asks for; what follows them has no meaning."""
    top: TensorValue
    """float32 `[B, J, 20]`: those of `top_tokens`."""

    def values(self) -> tuple[TensorValue, ...]:
        """The graph's outputs in order."""
        return self.tokens, self.top_tokens, self.top


def find_logprobs(logits: TensorValue, tokens: TensorValue, num_logprobs: TensorValue) -> Logprobs:
    """Finds the log probabilities that the logits give.

    Args:
        logits: float32 `[B, J, V]`, as the target has them, before penalties and temperature.
        tokens: int64 `[B, J]`, one of each position.
        num_logprobs: int64 scalar on the CPU, see `SamplingFields`; what it does not ask for is
            not computed.
    """

    def found(*_: TensorValue) -> list[TensorValue]:
        total = _log_sum_exp(logits)  # [B, J, 1]
        top = _most_probable(logits, num_logprobs - 1)  # [B, J, 20]
        own = _at(logits, ops.unsqueeze(tokens, -1)) - total  # [B, J, 1]
        return [ops.squeeze(own, -1), top, _at(logits, top) - total]

    no_value = ops.constant(0.0, DType.float32, device=logits.device)
    no_token = ops.constant(0, DType.int64, device=logits.device)
    wide = [*tokens.shape, _WIDTH]
    nothing = [
        ops.broadcast_to(no_value, tokens.shape),
        ops.broadcast_to(no_token, wide),
        ops.broadcast_to(no_value, wide),
    ]
    own, top, probs = run_if(num_logprobs > 0, nothing, found)
    return Logprobs(tokens=own, top_tokens=top, top=probs)


def _log_sum_exp(logits: TensorValue) -> TensorValue:
    """float32 `[B, J, 1]`: the logarithm of the sum of exponentials."""
    largest = ops.max(logits, axis=-1)
    # In float64: a float32 sum would lose the small summands of a large vocabulary.
    total = ops.sum(ops.exp(logits - largest).cast(DType.float64), axis=-1)
    found: TensorValue = largest + ops.log(total.cast(DType.float32))
    return found


def _most_probable(logits: TensorValue, count: TensorValue) -> TensorValue:
    """The `count` largest logits' tokens: int64 `[B, J, 20]`, the largest first.

    Each round of a loop takes the best of those that remain, so that the cost follows the count. It
    counts on the device, too: a loop in a loop of max 26.7 cannot move a value there.

    Args:
        count: int64 scalar on the CPU; 0 or less finds none.
    """
    batch, positions, vocab = logits.shape
    device = logits.device
    ids = ops.range(0, vocab, 1, out_dim=vocab, dtype=DType.int64, device=device)
    columns = ops.range(0, _WIDTH, 1, out_dim=_WIDTH, dtype=DType.int64, device=device)
    taken = ops.constant(float("-inf"), DType.float32, device=device)
    first = ops.constant(0, DType.int64, device=DeviceRef.CPU())
    none = ops.constant(0, DType.int64, device=device)
    found = ops.broadcast_to(none, [batch, positions, _WIDTH])

    def unfinished(round_: TensorValue, count: TensorValue, *_: TensorValue) -> TensorValue:
        return round_ < count

    def take_best(
        round_: TensorValue,
        count: TensorValue,
        column: TensorValue,
        remaining: TensorValue,
        found: TensorValue,
    ) -> list[TensorValue]:
        best = ops.argmax(remaining, axis=-1)  # [B, J, 1]
        return [
            round_ + 1,
            count,
            column + 1,
            ops.where(ids == best, taken, remaining),
            ops.where(columns == column, best, found),
        ]

    return ops.while_loop([first, count, none, logits, found], unfinished, take_best)[4]


def _at(logits: TensorValue, tokens: TensorValue) -> TensorValue:
    """The logits `[B, J, n]` of tokens `[B, J, n]`."""
    return ops.gather_nd(logits, ops.unsqueeze(tokens, -1), batch_dims=2)
