"""What goes into one step of a unified graph and what comes out, as graph values."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

from max import tree
from max.dtype import DType
from max.graph import BufferType, DeviceRef, DimLike, TensorType, TensorValue, Value, ops
from max.nn.kv_cache import KVCacheParamInterface, MultiKVCacheParams, PagedCacheValues

from unispec.kv_cache.views import as_one_batch, take_copies
from unispec.sampling.inputs import (
    BITMASK,
    SAMPLING_PARAMETERS,
    SamplingInputs,
    sampling_types,
)
from unispec.sampling.logprobs import Logprobs

from .deferred import DEFERRED_INPUTS, DeferredInputs, FeatureType, deferred_types

__all__ = [
    "INPUT_ORDER",
    "VOID_TOKEN",
    "StepInputs",
    "StepOutputs",
    "StepSignature",
]

VOID_TOKEN = -1
"""Draft token of a row that has none to verify; no acceptance rule accepts it."""


@dataclass(frozen=True)
class StepInputs:
    """One step's inputs. B rows; T new tokens in all; K draft tokens a row."""

    tokens: TensorValue
    """int64 `[T]`: the new verified tokens of each row, ragged."""
    row_offsets: TensorValue
    """uint32 `[B + 1]`: where each row starts in `tokens`."""
    return_n_logits: TensorValue
    """int64 `[1]` on the CPU: logit rows per row, K + 1; the step takes it from `draft_tokens`."""
    draft_tokens: TensorValue
    """int64 `[B, K]`: what the last step proposed; -1 where a row has nothing to verify."""
    known_next_tokens: TensorValue
    """int64 `[B]`: the token after a prefill chunk; -1 where the step decides it."""
    num_speculative_tokens: TensorValue
    """int64 scalar on the CPU: how many tokens to propose; 0: the draft may read, but proposes
    nothing."""
    sampling: SamplingInputs
    """The sampling parameters of each row."""
    caches: Sequence[PagedCacheValues]
    """The target's cache, then the draft's if there is one, as the first device sees it."""
    draft_probs: TensorValue | None
    """float32 `[B, K, V]`: what `draft_tokens` were sampled from, for sampled drafts."""
    in_thinking_phase: TensorValue | None
    """bool `[B]`: rows inside a thinking block, for relaxed acceptance."""
    deferred: DeferredInputs | None = None
    """What the draft has not read yet; None: the target is alone, or its draft reads in each
    step."""
    extra: Mapping[str, Sequence[Value[Any]]] = field(default_factory=dict)
    """The inputs that only some architectures have, see `StepSignature`."""
    copies: Sequence[Sequence[PagedCacheValues]] = ()
    """Each of `caches` as every device has it, the first device's first; replicas of data-parallel
    attention have the rows of `extra["data_parallel_splits"]` only."""


@dataclass(frozen=True)
class StepOutputs:
    """One step's outputs."""

    num_accepted_draft_tokens: TensorValue
    """int64 `[B]`."""
    next_tokens: TensorValue
    """int64 `[B]`: the token after the accepted run."""
    next_draft_tokens: TensorValue
    """int64 `[B, num_speculative_tokens]`."""
    lengths: TensorValue
    """uint32 `[B]`: verified tokens of each row, so the next step's lengths of both caches."""
    logprobs: Logprobs
    """Of the tokens of K + 1 positions a row, where the batch asks for them."""
    next_draft_probs: TensorValue | None = None
    """float32 `[B, num_speculative_tokens, V]`, for sampled drafts."""

    def values(self) -> tuple[TensorValue, ...]:
        """The graph's outputs in order; the last are `lengths`, and a report for the host.

        The report is int64 `[B, 2 + P]`: accepted drafts, next token and P proposals of each row.
        """
        first = (self.num_accepted_draft_tokens, self.next_tokens, self.next_draft_tokens)
        probs = () if self.next_draft_probs is None else (self.next_draft_probs,)
        columns = [
            ops.unsqueeze(self.num_accepted_draft_tokens, 1),
            ops.unsqueeze(self.next_tokens, 1),
        ]
        report = ops.concat([*columns, self.next_draft_tokens], axis=1)
        return (*first, *probs, *self.logprobs.values(), self.lengths, report)


INPUT_ORDER = (
    "tokens",
    "input_row_offsets",
    "return_n_logits",
    "draft_tokens",
    "known_next_tokens",
    "num_speculative_tokens",
    "kv_cache_inputs",
    *SAMPLING_PARAMETERS,
)
"""The inputs of a graph on one device in order, before those that only some graphs take."""

# Names under which the caches may stand: together, or the target's and the draft's.
_CACHES = ("kv_cache_inputs", "target_kv_cache", "draft_kv_cache")


@dataclass(frozen=True)
class StepSignature:
    """Input types of a unified graph, and the way back from its inputs to `StepInputs`."""

    device: DeviceRef
    """Where the graph runs."""
    vocab_size: int
    """V, the target's."""
    kv_params: KVCacheParamInterface
    """The target's cache, or a tree with the children `target` and `draft`."""
    sampled_drafts: bool = False
    """Whether the graph takes the distributions that drafts were sampled from."""
    thinking_phase: bool = False
    """Whether the graph takes which rows are inside a thinking block."""
    features: FeatureType | None = None
    """What the draft reads of a position, in a graph whose draft need not read in each step."""
    order: Sequence[str] = INPUT_ORDER
    """Names of the inputs in the graph's order."""
    extra: Mapping[str, Sequence[TensorType | BufferType]] = field(default_factory=dict)
    """Types of inputs in `order` that only some architectures have."""

    def types(self) -> list[TensorType | BufferType]:
        """Graph input types in order."""
        named = self._named()
        return [declared for name in self._names() for declared in named[name]]

    def take(self, inputs: Sequence[Value[Any]]) -> StepInputs:
        """Reads the graph inputs that `types` declares.

        Args:
            inputs: the graph's inputs, in the order of `types`.
        """
        named, rest = self._named(), iter(inputs)
        taken = {name: [next(rest) for _ in named[name]] for name in self._names()}
        if "pinned_bitmask" in taken:
            # Where masks come late, the acceptance rule waits for them, see `AfterMasks`.
            taken[BITMASK] = taken["pinned_bitmask"]

        def one(name: str) -> TensorValue:
            (value,) = taken[name]
            return value.tensor

        caches = chain.from_iterable(taken[name] for name in _CACHES if name in taken)
        copies = take_copies(self.kv_params, caches)
        return StepInputs(
            tokens=one("tokens"),
            row_offsets=one("input_row_offsets"),
            return_n_logits=one("return_n_logits"),
            draft_tokens=one("draft_tokens"),
            known_next_tokens=one("known_next_tokens"),
            num_speculative_tokens=one("num_speculative_tokens"),
            caches=[as_one_batch(found) for found in copies],
            sampling=SamplingInputs(**{name: one(name) for name in SAMPLING_PARAMETERS}),
            draft_probs=one("draft_probs_full") if self.sampled_drafts else None,
            in_thinking_phase=one("in_thinking_phase") if self.thinking_phase else None,
            deferred=DeferredInputs.of(taken) if self.features else None,
            extra={name: taken[name] for name in self.extra},
            copies=copies,
        )

    def _names(self) -> list[str]:
        optional = {
            "draft_probs_full": self.sampled_drafts,
            "in_thinking_phase": self.thinking_phase,
            **dict.fromkeys(DEFERRED_INPUTS, self.features is not None),
        }
        return [*self.order, *(name for name, is_taken in optional.items() if is_taken)]

    def _named(self) -> dict[str, Sequence[TensorType | BufferType]]:
        cpu, device = DeviceRef.CPU(), self.device
        probs: list[DimLike] = ["batch", "num_draft_tokens", self.vocab_size]
        caches: Any = self.kv_params.get_symbolic_inputs()
        branches = {}
        if isinstance(self.kv_params, MultiKVCacheParams):
            branches = {
                f"{name}_kv_cache": tree.leaves(caches[name]) for name in ("target", "draft")
            }
        return {
            "tokens": [TensorType(DType.int64, ["num_tokens"], device=device)],
            "input_row_offsets": [TensorType(DType.uint32, ["num_row_offsets"], device=device)],
            "return_n_logits": [TensorType(DType.int64, [1], device=cpu)],
            "draft_tokens": [TensorType(DType.int64, ["batch", "num_draft_tokens"], device=device)],
            "known_next_tokens": [TensorType(DType.int64, ["batch"], device=device)],
            "num_speculative_tokens": [TensorType(DType.int64, [], device=cpu)],
            "kv_cache_inputs": tree.leaves(caches),
            **branches,
            **{name: [t] for name, t in sampling_types(device, self.vocab_size).items()},
            "draft_probs_full": [TensorType(DType.float32, probs, device=device)],
            "in_thinking_phase": [TensorType(DType.bool, ["batch"], device=device)],
            **(deferred_types(self.features, device) if self.features else {}),
            **self.extra,
        }
