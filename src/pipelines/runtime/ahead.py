"""Decode steps that are enqueued before the step before them was read.

What such a step needs of the last one, its tokens, lengths and proposals, is on the device already.
So a device does not wait for the host, which meanwhile reads and hands out what the last step
brought. If the host then wants another step than the one that was enqueued, because a request came,
or K is to be another, that one is dropped: it wrote behind the verified positions only, and a draw
depends on its request's seed and position alone.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from time import perf_counter
from typing import Any, Final

from max import tree
from max.driver import Buffer, batch_inplace_copy
from max.dtype import DType
from max.nn.kv_cache import KVCacheInputsPerDevice
from max.pipelines.context import TextContext
from max.pipelines.kv_cache import InsufficientBlocksError, PagedKVCacheManagerInterface
from max.pipelines.request import RequestID

from unispec.pipelines.speculative.step import VOID_TOKEN

from .captured import Captured
from .inputs import StepModelInputs
from .launched import Launched
from .model import StepModel
from .outputs import StepModelOutputs
from .readback import Reading
from .rows import Row, in_prefill

__all__ = ["LookAhead"]

# MAX's server shows what its own loggers say, and no others.
logger = logging.getLogger("max.pipelines.unispec")


# A step that is like the last one for so many times is worth recording.
_CAPTURED_AFTER: Final = 2


@dataclass
class _Resident:
    """Inputs that stay where they are from one decode step to the next."""

    inputs: StepModelInputs
    lengths: Buffer
    """uint32 `[B]`, of both caches."""
    limits: Sequence[int]
    """How long each row may be at its end before its pages have to be looked up again."""
    uses: int = 0
    """Steps that had them."""
    captured: Captured | None = None
    """The step, once the device has recorded it."""


class LookAhead:
    """Enqueues steps ahead, one at most.

    Args:
        model: of one device.
        manager: of its caches.
        captures: whether the device records a step that comes again and again; not with sampled
            drafts, of which a step reads what the last one wrote.
        has_reserved_pages: whether a request has pages for its longest length, whoever asks for
            more; then they are looked up once. Else a row is given those that it is in.

    Attributes:
        num_taken: steps that were enqueued ahead and used.
        num_dropped: likewise, and not used.
    """

    def __init__(
        self,
        model: StepModel,
        manager: PagedKVCacheManagerInterface,
        *,
        captures: bool = False,
        has_reserved_pages: bool = False,
    ) -> None:
        self.num_taken = self.num_dropped = 0
        self._captures = captures
        self._has_reserved_pages = has_reserved_pages
        self._model = model
        self._manager = manager
        self._pending: Launched | None = None
        # What it verifies, known once the step before it was read.
        self._verifies: dict[RequestID, list[int]] = {}
        self._resident: _Resident | None = None
        self._memory: dict[int, Buffer] = {}

    def take(
        self, contexts: Sequence[TextContext], rows: Sequence[Row], proposals: int
    ) -> tuple[Launched, list[int]] | None:
        """The step that was enqueued, if it is the one that is wanted, and the row of each request.

        It may have rows of requests that have ended since.

        Args:
            rows: with what is to be verified in `drafts`.
            proposals: how many tokens a row are to be proposed.
        """
        pending, self._pending = self._pending, None
        # Empty if the last step failed before it was taken note of: then nothing fits.
        verifies, self._verifies = self._verifies, {}
        if pending is None:
            return None
        places = pending.places(contexts)
        fits = proposals == pending.proposals and all(
            row.drafts == verifies.get(context.request_id) and not in_prefill(context, row)
            for context, row in zip(contexts, rows, strict=True)
        )
        if places is None or not fits:
            self.num_dropped += 1
            self.forget()
            return None
        self.num_taken += 1
        return pending, places

    def has_read(self, proposals: Mapping[RequestID, list[int]]) -> None:
        """Takes note of what the last step proposed, which the step after it verifies.

        Args:
            proposals: of each request that has not ended.
        """
        self._verifies = dict(proposals)

    def forget(self) -> None:
        """To be called before other inputs than those of this object are written."""
        self._pending = None
        self._keep(None)

    def follow(
        self,
        last: Launched,
        contexts: Sequence[TextContext],
        rows: Sequence[Row],
        proposals: int | None,
        read: Callable[[Buffer], Reading],
    ) -> None:
        """Enqueues the step after one that was not read yet, if that needs nothing of the host.

        Args:
            last: with these requests as its rows, in this order, none of which has moved on yet.
            proposals: how many tokens a row it will most likely have to propose; None: unknown.
            read: begins to read a report.
        """
        if not self._possible(last, contexts, rows, proposals):
            return
        resident = self._inputs(last, contexts)
        if resident is None:
            return
        inputs, outputs = resident.inputs, last.outputs
        assert inputs.draft_tokens is not None
        into = [inputs.tokens, resident.lengths]
        new = [outputs.next_tokens, outputs.next_lengths]
        if last.width:
            into.append(inputs.draft_tokens)
            new.append(outputs.next_draft_tokens)
        began = perf_counter()
        batch_inplace_copy(into, new)
        self._keep(resident)
        made = self._run(resident, outputs.next_draft_probs_full)
        self._pending = replace(
            last, inputs=inputs, outputs=made, reading=read(made.report), began_s=began
        )

    def _keep(self, resident: _Resident | None) -> None:
        kept, self._resident = self._resident, resident
        if kept is not None and kept is not resident and kept.captured is not None:
            kept.captured.release()

    def _run(self, resident: _Resident, probs: Buffer | None) -> StepModelOutputs:
        """Enqueues the step.

        Args:
            probs: float32 `[B, K, V]`, what sampled drafts were drawn from.
        """
        inputs = resident.inputs
        if probs is not None:
            return self._model.execute(replace(inputs, draft_probs_full=probs))
        resident.uses += 1
        if self._captures and resident.captured is None and resident.uses > _CAPTURED_AFTER:
            try:
                resident.captured = Captured(self._model.model, inputs.buffers)
            except RuntimeError as error:
                logger.warning("The device cannot record steps, they are launched: %s", error)
                self._captures = False
        if resident.captured is None:
            return self._model.execute(inputs)
        return self._model.outputs_of(resident.captured.replay())

    def _possible(
        self,
        last: Launched,
        contexts: Sequence[TextContext],
        rows: Sequence[Row],
        proposals: int | None,
    ) -> bool:
        """Whether the step is of the same kind, needs nothing of the host, and has room."""
        model = self._model
        width = last.outputs.next_draft_tokens.shape[1] if model.most_proposed else 0
        if (width, proposals) != (last.width, last.proposals) or len(model.devices) != 1:
            return False
        if model.batch.deferred is not None and not proposals:
            return False  # what the draft has not read is known to the host only
        brings = 2 * (width + 1)
        return last.inputs.in_thinking_phase is None and all(
            not in_prefill(context, row)
            and row.grammar is None
            and row.generated >= row.min_new_tokens
            and row.sampling.token_counts is None
            and not row.sampling.num_logprobs
            and len(context.tokens) + brings <= context.max_length
            for context, row in zip(contexts, rows, strict=True)
        )

    def _inputs(self, last: Launched, contexts: Sequence[TextContext]) -> _Resident | None:
        """The inputs of the step, those of the last one if they serve again."""
        ends = [context.tokens.current_position + 1 + 2 * last.width for context in contexts]
        kept = self._resident
        if (
            kept is not None
            and kept.inputs is last.inputs
            and all(end <= limit for end, limit in zip(ends, kept.limits, strict=True))
        ):
            return kept
        limits = [self._limit(*pair) for pair in zip(ends, contexts, strict=True)]
        found = self._caches(contexts, limits, last.width)
        if found is None:
            return None
        lengths = self._lengths(len(contexts))
        caches = tree.map(
            lambda cache: replace(cache, cache_lengths=lengths), found, leaf=KVCacheInputsPerDevice
        )
        inputs = self._model.following_inputs(last.inputs, caches, limits)
        return _Resident(inputs, lengths, limits)

    def _limit(self, end: int, context: TextContext) -> int:
        """How long a row may be that is so long, at least, before its pages are looked up again."""
        if self._has_reserved_pages:
            return context.max_length
        params = self._model.kv_params
        # Behind its end a row has room for what is proposed.
        size, spare = params.page_size, params.num_draft_tokens + 1
        return min(-(-(end + spare) // size) * size - spare, context.max_length)

    def _caches(self, contexts: Sequence[TextContext], limits: Sequence[int], width: int) -> Any:
        """The inputs of caches whose rows may become so long; None: there are no pages left."""
        try:
            for context, limit in zip(contexts, limits, strict=True):
                state = context.spec_decoding_state
                state.draft_tokens_to_verify = [VOID_TOKEN] * width
                # As if so many tokens were verified already.
                ahead = limit - width - 1 - context.tokens.processed_length
                state.maybe_accepted_draft_tokens = [VOID_TOKEN] * ahead
                self._manager.alloc(context)
            return self._manager.runtime_inputs([list(contexts)])
        except InsufficientBlocksError:
            return None
        finally:
            for context in contexts:
                state = context.spec_decoding_state
                state.draft_tokens_to_verify = state.maybe_accepted_draft_tokens = []

    def _lengths(self, rows: int) -> Buffer:
        """Memory of lengths, uint32 `[B]`."""
        if rows not in self._memory:
            self._memory[rows] = Buffer.zeros([rows], DType.uint32, self._model.devices[0])
        return self._memory[rows]
