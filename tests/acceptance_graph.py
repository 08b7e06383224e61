"""Every acceptance rule on the same inputs, in one compiled graph."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from max.driver import CPU, Buffer, Device
from max.dtype import DType
from max.engine import InferenceSession
from max.graph import DeviceRef, Graph, TensorType, ops
from reference.distribution import target_distribution as exact_distribution

from unispec.sampling.acceptance import (
    AcceptanceRule,
    Accepted,
    Matching,
    Rejection,
    Relaxed,
    Synthetic,
    Verification,
    accept_run,
)
from unispec.sampling.buffers import SamplingBuffers
from unispec.sampling.distribution import draw, shape_logits, target_distribution
from unispec.sampling.inputs import (
    SAMPLING_PARAMETERS,
    RowSampling,
    SamplingInputs,
    sampling_types,
)
from unispec.sampling.seeds import Stream, positions, uniform

__all__ = [
    "MAX_ROWS",
    "RATE",
    "RELAXED_DELTA",
    "RELAXED_TOP_N",
    "VOCAB",
    "AcceptanceGraph",
    "Outcome",
    "Request",
    "Verdict",
    "build_graph",
    "masks",
]

VOCAB = 40  # two words of a grammar mask, the second one not full
MAX_ROWS = 20_000
MAX_POSITIONS = 9
RELAXED_TOP_N = 3
RELAXED_DELTA = 0.15
RATE = 0.7

BoolArray = npt.NDArray[np.bool_]
FloatArray = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.int64]


class NaiveRedraw:
    """Broken on purpose: after a refusal it draws from p, the refused draft included.

    A draft d is emitted with p(d) + (1 - p(d)) p(d), all others with (1 - p(d)) p.
    """

    def __call__(self, step: Verification, sampling: SamplingInputs) -> Accepted:
        draft = step.draft_tokens  # [B, K]
        weights = target_distribution(shape_logits(step.logits, draft, sampling), sampling)
        verified = weights[:, :-1].rebind([*draft.shape, VOCAB])
        index = ops.unsqueeze(ops.max(draft, 0), -1)
        p_draft = ops.gather_nd(verified, index, batch_dims=2) / ops.squeeze(
            ops.sum(verified, axis=-1), -1
        )
        where = positions(step.first_position, weights)
        coin = uniform(sampling.seed, where[:, :-1], Stream.ACCEPT).reshape(draft.shape)
        tokens = draw(weights, uniform(sampling.seed, where, Stream.TOKEN))
        stands = coin < p_draft.cast(DType.float64)
        return accept_run(ops.logical_and(draft >= 0, stands), draft, tokens)


RULES: dict[str, AcceptanceRule] = {
    "matching": Matching(),
    "rejection": Rejection(),
    "relaxed": Relaxed(RELAXED_TOP_N, RELAXED_DELTA),
    "synthetic": Synthetic(RATE),
    "naive": NaiveRedraw(),
}


@dataclass(frozen=True)
class Request:
    """Sampling parameters, for the graph and for the exact reference."""

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    prompt: tuple[int, ...] = ()
    logit_bias: Mapping[int, float] | None = None
    allowed: BoolArray | None = None
    """Tokens that the grammar allows, [V]."""

    def row(self, seed: int, generated: Iterable[int] = ()) -> RowSampling:
        """What the runtime gives to the graph once `generated` has been emitted."""
        row = RowSampling(
            seed=seed,
            temperature=self.temperature,
            top_k=self.top_k,
            top_p=self.top_p,
            min_p=self.min_p,
            presence_penalty=self.presence_penalty,
            frequency_penalty=self.frequency_penalty,
            repetition_penalty=self.repetition_penalty,
        )
        if (self.presence_penalty, self.frequency_penalty, self.repetition_penalty) != (0, 0, 1):
            row.token_counts = np.zeros(VOCAB, np.int32)
            row.token_counts[list(self.prompt)] = -1
            for token in generated:
                row.count(token)
        if self.logit_bias is not None:
            row.logit_bias = np.zeros(VOCAB, np.float32)
            row.logit_bias[list(self.logit_bias)] = list(self.logit_bias.values())
        return row

    def distribution(self, logits: npt.ArrayLike, generated: Sequence[int] = ()) -> FloatArray:
        """The exact law [V] of the token after `generated`."""
        return exact_distribution(
            logits,
            temperature=self.temperature,
            top_k=self.top_k or -1,
            top_p=self.top_p,
            min_p=self.min_p,
            presence_penalty=self.presence_penalty,
            frequency_penalty=self.frequency_penalty,
            repetition_penalty=self.repetition_penalty,
            prompt_ids=self.prompt,
            generated_ids=generated,
            logit_bias=self.logit_bias,
            allowed=self.allowed,
        )


class Verdict(NamedTuple):
    """What one rule says."""

    num_accepted: IntArray  # [B]
    next_tokens: IntArray  # [B]
    tokens: IntArray  # [B, K + 1]

    def emitted(self) -> list[list[int]]:
        """Of each row the accepted drafts and the next token."""
        return [
            row[: count + 1].tolist()
            for count, row in zip(self.num_accepted, self.tokens, strict=True)
        ]


class Outcome(NamedTuple):
    """Everything that one execution returns."""

    verdicts: dict[str, Verdict]
    probs: FloatArray  # [B, K + 1, V], the target distribution
    uniforms: dict[Stream, FloatArray]  # [B, K + 1] each


def build_graph(device: DeviceRef) -> Graph:
    """Builds the graph for any batch and any K; nothing is compiled."""
    types = [
        TensorType(DType.float32, ["batch", "num_positions", VOCAB], device),
        TensorType(DType.int64, ["batch", "num_drafts"], device),
        TensorType(DType.int64, ["batch"], device),
        TensorType(DType.float32, ["batch", "num_drafts", VOCAB], device),
        TensorType(DType.bool, ["batch"], device),
        TensorType(DType.float32, [1, "num_draws", "any_vocab"], device),
        TensorType(DType.float64, [1, "num_draws"], device),
        *sampling_types(device, VOCAB).values(),
    ]
    with Graph("acceptance_rules", input_types=types) as graph:
        inputs = iter(graph.inputs)
        logits, drafts, first_position, draft_probs, thinking, any_weights, points = (
            next(inputs).tensor for _ in range(7)
        )
        sampling = SamplingInputs(**{name: next(inputs).tensor for name in SAMPLING_PARAMETERS})
        logits = ops.rebind(logits, ["batch", drafts.shape[1] + 1, VOCAB])
        step = Verification(logits, drafts, first_position, draft_probs, thinking)
        verdicts = [rule(step, sampling) for rule in RULES.values()]
        weights = target_distribution(shape_logits(logits, drafts, sampling), sampling)
        where = positions(first_position, logits)
        graph.output(
            *(v for a in verdicts for v in (a.num_accepted, a.next_tokens, a.tokens)),
            weights,
            *(uniform(sampling.seed, where, stream) for stream in Stream),
            draw(any_weights, points),
        )
    return graph


def masks(requests: Sequence[Request]) -> BoolArray:
    """What the grammars of a batch allow, [B, 1, V]."""
    everything = np.ones(VOCAB, np.bool_)
    allowed = [everything if request.allowed is None else request.allowed for request in requests]
    return np.stack(allowed)[:, np.newaxis]


class AcceptanceGraph:
    """The compiled graph, fed as the runtime feeds its own; on a CPU if no device is given."""

    def __init__(self, device: Device | None = None) -> None:
        self._device = device or CPU()
        graph = build_graph(DeviceRef.from_device(self._device))
        self._model = InferenceSession(devices=[self._device]).load(graph)
        self._buffers = SamplingBuffers(MAX_ROWS, VOCAB, MAX_POSITIONS, self._device)

    def run(
        self,
        rows: Sequence[RowSampling],
        logits: npt.NDArray[np.float32],
        drafts: npt.NDArray[np.int64],
        *,
        first_position: npt.ArrayLike = 0,
        draft_probs: npt.NDArray[np.float32] | None = None,
        thinking: npt.ArrayLike = False,
        allowed: BoolArray | None = None,
    ) -> Outcome:
        """Executes one step.

        Args:
            rows: the batch, B rows.
            logits: [B, K + 1, V], or anything that broadcasts to it.
            drafts: [B, K].
            first_position: [B] or one for all.
            draft_probs: [B, K, V], or anything that broadcasts to it; None is zero.
            thinking: [B] or one for all.
            allowed: [B, K + 1, V], or anything that broadcasts to it; None allows all.
        """
        batch, num_drafts = drafts.shape
        bitmask = self._buffers.bitmask(batch, num_drafts + 1)
        if allowed is not None:
            bitmask[...] = _packed(allowed)
        if draft_probs is None:
            draft_probs = np.zeros(VOCAB, np.float32)
        outputs = self._execute(
            _full(logits, (batch, num_drafts + 1, VOCAB), np.float32),
            _full(drafts, (batch, num_drafts), np.int64),
            _full(first_position, (batch,), np.int64),
            _full(draft_probs, (batch, num_drafts, VOCAB), np.float32),
            _full(thinking, (batch,), np.bool_),
            np.ones((1, 1, 1), np.float32),
            np.zeros((1, 1)),
            sampling=self._buffers.fill(rows, bitmask).values(),
        )
        verdicts = {name: Verdict(*(next(outputs) for _ in range(3))) for name in RULES}
        weights = next(outputs).astype(np.float64)
        probs = weights / weights.sum(axis=-1, keepdims=True)
        return Outcome(verdicts, probs, {stream: next(outputs) for stream in Stream})

    def draw(self, weights: npt.NDArray[np.float32], points: FloatArray) -> IntArray:
        """The tokens [N] at points [N] in [0, 1) of the distribution [any V]."""
        *_, tokens = self._execute(
            np.zeros((1, 1, VOCAB), np.float32),
            np.zeros((1, 0), np.int64),
            np.zeros(1, np.int64),
            np.zeros((1, 0, VOCAB), np.float32),
            np.zeros(1, np.bool_),
            _full(weights, (1, len(points), len(weights)), np.float32),
            points[np.newaxis],
            sampling=self._buffers.fill([Request().row(0)], self._buffers.bitmask(1, 1)).values(),
        )
        return np.asarray(tokens[0], np.int64)

    def _execute(
        self, *values: npt.NDArray[np.generic], sampling: Iterable[Buffer]
    ) -> Iterator[npt.NDArray[Any]]:
        own = (Buffer.from_numpy(value).to(self._device) for value in values)
        outputs = self._model.execute(*own, *sampling)
        return (output.to_numpy() for output in outputs)


def _full(
    value: npt.ArrayLike, shape: tuple[int, ...], dtype: type[np.generic]
) -> npt.NDArray[np.generic]:
    return np.ascontiguousarray(np.broadcast_to(np.asarray(value, dtype), shape))


def _packed(allowed: BoolArray) -> npt.NDArray[np.int32]:
    """Bit i of word w is token 32 w + i; bits from V on are zero."""
    bits = np.zeros((*allowed.shape[:-1], -(-VOCAB // 32) * 32), np.bool_)
    bits[..., :VOCAB] = allowed
    return np.packbits(bits, axis=-1, bitorder="little").view(np.int32)
