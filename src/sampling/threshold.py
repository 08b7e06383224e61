"""Top-k and top-p as one search for a cut, without sorting the vocabulary."""

from __future__ import annotations

from max.dtype import DType
from max.graph import DeviceRef, TensorValue, ops

__all__ = ["LOWEST", "largest_cut"]

LOWEST = -80.0
"""Log weights below this count as zero: exp(-80) is 2e-35."""

# 80 / 2**32 is below float32's spacing everywhere but next to 0, where it is 2e-8.
_ITERATIONS = 32


def largest_cut(
    log_weights: TensorValue, mass: TensorValue, needed: TensorValue, enabled: TensorValue
) -> TensorValue:
    """Finds, for each row, the highest cut that keeps at least the needed mass.

    The entries `log_weights >= cut` are the smallest set of largest entries whose
    mass reaches `needed`; entries equal to the last one kept are kept too. With
    unit mass and `needed = k` this is top-k, with probabilities and
    `needed = top_p` it is top-p (nucleus sampling, Holtzman et al. 2019).

    Args:
        log_weights: float32 `[R, V]`, at most 0.
        mass: float32 `[R, V]`, not negative.
        needed: float32 `[R, 1]`.
        enabled: bool scalar on the CPU; when false nothing is searched.

    Returns:
        float32 `[R, 1]`, the cut; `LOWEST` where the mass is never reached or
        nothing was searched.
    """
    device = log_weights.device
    low = ops.broadcast_to(_scalar(LOWEST, device), needed.shape)
    high = ops.broadcast_to(_scalar(1.0, device), needed.shape)
    zero = ops.constant(0, DType.int64, device=DeviceRef.CPU())
    last = ops.constant(_ITERATIONS, DType.int64, device=DeviceRef.CPU())

    def searching(
        step: TensorValue, end: TensorValue, low: TensorValue, high: TensorValue
    ) -> TensorValue:
        return step < end

    def halve(
        step: TensorValue, end: TensorValue, low: TensorValue, high: TensorValue
    ) -> list[TensorValue]:
        middle = (low + high) * 0.5
        kept = ops.sum(ops.where(log_weights >= middle, mass, _scalar(0.0, device)), axis=-1)
        enough = kept >= needed  # [R, 1]
        return [
            step + 1,
            end,
            ops.where(enough, middle, low),
            ops.where(enough, high, middle),
        ]

    end = ops.where(enabled, last, zero)
    cut = ops.while_loop([zero, end, low, high], searching, halve)[2]
    # Where no mass is needed every cut reaches it; the largest entry, at 0, stays.
    kept: TensorValue = ops.min(cut, _scalar(0.0, device))
    return kept


def _scalar(value: float, device: DeviceRef) -> TensorValue:
    return ops.constant(value, DType.float32, device=device)
