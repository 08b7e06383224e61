"""The target distribution p: what a request's sampling parameters make of the logits."""

from __future__ import annotations

from max.dtype import DType
from max.graph import DeviceRef, Dim, TensorValue, ops
from max.nn.kernels import apply_packed_bitmask

from .branch import replace_if
from .inputs import SamplingInputs
from .threshold import largest_cut

__all__ = ["draw", "shape_logits", "target_distribution"]

# Not infinite: the difference of two of them must not be NaN.
_LARGEST = 1e30
# Below any logit with any bias.
_MASKED = -1e38


def shape_logits(
    logits: TensorValue, draft_tokens: TensorValue, sampling: SamplingInputs
) -> TensorValue:
    """Applies penalties, logit bias and grammar mask.

    Repetition penalty as in CTRL (Keskar et al. 2019): logits of tokens seen in
    the prompt or the output are divided by it when positive, multiplied when
    negative. Frequency and presence penalties as in the OpenAI API: subtracted
    per generated occurrence, and once for a generated token.

    Args:
        logits: float32 `[B, J, V]`, position j follows the first j draft tokens.
        draft_tokens: int64 `[B, J - 1]`; they count as generated at later positions.

    Returns:
        float32 `[B, J, V]`; masked tokens are at -1e38, the others between -1e30 and 1e30.
    """
    batch, positions = logits.shape[:2]
    logits = replace_if(
        sampling.num_penalised > 0,
        logits,
        lambda logits: _penalised(logits, draft_tokens, sampling),
    )
    logits = logits + ops.unsqueeze(sampling.logit_bias, 1)
    largest = _f32(_LARGEST, logits.device)
    return apply_packed_bitmask(
        ops.max(ops.min(logits, largest), -largest),
        ops.rebind(sampling.token_bitmask, [batch, positions, sampling.token_bitmask.shape[2]]),
        _MASKED,
    )


def _penalised(
    logits: TensorValue, draft_tokens: TensorValue, sampling: SamplingInputs
) -> TensorValue:
    """The logits after the three penalties: float32 `[B, J, V]`."""
    _, positions, vocab = logits.shape
    counts = ops.unsqueeze(sampling.token_counts, 1)  # [B, 1, V]
    drafted = _drafted_before(draft_tokens, positions, vocab)  # [B, J, V]
    seen = ops.logical_or(counts != 0, drafted > 0)
    generated = (ops.max(counts, 0) + drafted).cast(DType.float32)

    repetition = _per_row(sampling.repetition_penalty)  # [B, 1, 1]
    repeated = ops.where(logits > 0, logits / repetition, logits * repetition)
    logits = ops.where(seen, repeated, logits)
    logits = logits - generated * _per_row(sampling.frequency_penalty)
    present = (generated > 0).cast(DType.float32)
    penalised: TensorValue = logits - present * _per_row(sampling.presence_penalty)
    return penalised


def target_distribution(logits: TensorValue, sampling: SamplingInputs) -> TensorValue:
    """Applies temperature, top-k, top-p and min-p, in this order, to shaped logits.

    top-p counts the mass of what top-k kept; min-p keeps tokens with at least
    `min_p` times the probability of the most probable one. Temperature 0 is
    greedy: all mass on the argmax.

    Args:
        logits: float32 `[B, J, V]` from `shape_logits`.

    Returns:
        float32 `[B, J, V]`, weights that are not normalised; the largest of a position is 1.
    """
    batch, positions, vocab = logits.shape
    rows = [batch * positions, vocab]
    device = logits.device
    zero, one, never = _f32(0.0, device), _f32(1.0, device), _f32(float("inf"), device)
    temperature = _per_row(sampling.temperature)  # [B, 1, 1]
    greedy = temperature <= 0
    log_weights = (logits - ops.max(logits, axis=-1)) / ops.where(greedy, one, temperature)
    flat = log_weights.reshape(rows)  # [B * J, V], at most 0
    weights = ops.exp(flat)

    top_k = _per_position(sampling.top_k, logits).cast(DType.float32)  # [B * J, 1]
    cut = largest_cut(
        flat,
        ops.broadcast_to(one, flat.shape),
        ops.where(top_k > 0, top_k, never),
        sampling.max_k > 0,
    )
    mass = ops.where(flat >= cut, weights, zero)
    top_p = _per_position(sampling.top_p, logits)
    needed = ops.where(top_p < 1, top_p * ops.sum(mass, axis=-1), never)
    cut = largest_cut(flat, mass, needed, sampling.min_top_p < 1)
    mass = ops.where(flat >= cut, mass, zero)
    mass = ops.where(weights >= _per_position(sampling.min_p, logits), mass, zero)
    best = (_vocab_ids(vocab, device) == ops.argmax(logits, axis=-1)).cast(DType.float32)
    return ops.where(greedy, best, mass.reshape(logits.shape))


def draw(weights: TensorValue, uniform: TensorValue) -> TensorValue:
    """Draws one token per position by inverting the cumulative distribution.

    The sums are in float64: a float32 sum over a large vocabulary would move tokens of
    less than a millionth of the mass, or leave them out.

    Args:
        weights: float32 `[B, J, V]`, not negative, not all 0.
        uniform: float64 `[B, J]` in `[0, 1)`.

    Returns:
        int64 `[B, J]`; a token of weight 0 is never drawn.
    """
    cumulative = ops.cumsum(weights.cast(DType.float64), axis=-1)
    # The product of the total and a number below 1 is rounded to less than the total.
    point = ops.unsqueeze(uniform, -1) * ops.max(cumulative, axis=-1)  # [B, J, 1]
    skipped = (cumulative <= point).cast(DType.int64)
    return ops.squeeze(ops.sum(skipped, axis=-1), -1)


def _drafted_before(draft_tokens: TensorValue, positions: Dim, vocab: Dim) -> TensorValue:
    """int32 `[B, J, V]`: how often a token is among a row's first j drafts."""
    device = draft_tokens.device
    ids = _vocab_ids(vocab, device)
    hits = (ops.unsqueeze(draft_tokens, -1) == ids).cast(DType.int32)  # [B, J - 1, V]
    none = ops.broadcast_to(
        ops.constant(0, DType.int32, device=device), [draft_tokens.shape[0], 1, vocab]
    )
    counts = ops.cumsum(ops.concat([none, hits], axis=1), axis=1)
    return ops.rebind(counts, [draft_tokens.shape[0], positions, vocab])


def _vocab_ids(vocab: Dim, device: DeviceRef) -> TensorValue:
    return ops.range(0, vocab, 1, out_dim=vocab, dtype=DType.int64, device=device)


def _per_row(value: TensorValue) -> TensorValue:
    return value.reshape([value.shape[0], 1, 1])


def _per_position(value: TensorValue, like: TensorValue) -> TensorValue:
    """Repeats `[B]` for each of a row's positions: `[B * J, 1]`."""
    batch, positions = like.shape[0], like.shape[1]
    wide = ops.broadcast_to(ops.unsqueeze(value, 1), [batch, positions])
    return wide.reshape([batch * positions, 1])


def _f32(value: float, device: DeviceRef) -> TensorValue:
    return ops.constant(value, DType.float32, device=device)
