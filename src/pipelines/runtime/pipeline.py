"""The pipeline that drives a unified graph: one call of `execute`, one step of the batch."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain, zip_longest
from time import perf_counter
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from max.pipelines.context import LogProbabilities, TextContext, TextGenerationOutput
from max.pipelines.kv_cache import PagedKVCacheManagerInterface
from max.pipelines.lib import PipelineConfig
from max.pipelines.lib.pipeline_variants.text_generation import TextGenerationPipelineInterface
from max.pipelines.modeling.types import PipelineTokenizer, TextGenerationInputs
from max.pipelines.request import RequestID

from unispec.pipelines.speculative.step import VOID_TOKEN

from .logprobs import StepLogprobs
from .metrics import StepTimes
from .model import StepModel
from .outputs import StepModelOutputs
from .rows import Row, in_prefill
from .speculation import Speculation
from .thinking import ThinkingTokens

__all__ = ["Computed", "SpeculativePipeline"]


class Computed(NamedTuple):
    """What a graph put out for B rows, read where the host needs it in each step."""

    outputs: StepModelOutputs
    """All of it."""
    num_accepted: npt.NDArray[np.int64]
    """`[B]`."""
    next_tokens: npt.NDArray[np.int64]
    """`[B]`."""
    proposals: npt.NDArray[np.int64]
    """`[B, K]`; of a target alone what it verified."""
    graph_s: float
    """Seconds that the graph took, reading included."""


class SpeculativePipeline(TextGenerationPipelineInterface[TextContext]):
    """Runs mixed batches of prefill chunks and decode rows on a CPU or a GPU.

    The caller claims and allocates a request's pages before its step and releases
    them after its last one, as MAX's scheduler does.

    Args:
        kv_manager: pages of both caches.
        tokenizer: the target's tokenizer, for callers of this pipeline.
        thinking: what a graph with relaxed acceptance knows thinking blocks by; None: the
            caller sets `in_reasoning_phase` of the contexts.

    Attributes:
        speculation: decides what each step verifies and proposes; None: a step verifies what the
            draft proposed in the last one, and proposes `model.batch.num_speculative_tokens`.
        last_step: when the last step was; None before the first.
    """

    def __init__(
        self,
        model: StepModel,
        kv_manager: PagedKVCacheManagerInterface,
        tokenizer: PipelineTokenizer[Any, Any, Any] | None = None,
        thinking: ThinkingTokens | None = None,
    ) -> None:
        self._model = self._pipeline_model = model
        self._devices = model.devices
        self._kv_manager = kv_manager
        self._tokenizer = tokenizer
        self.thinking = thinking
        self.speculation: Speculation | None = None
        self.last_step: StepTimes | None = None

    @property
    def model(self) -> StepModel:
        """The compiled unified graph."""
        return self._model

    @property
    def kv_manager(self) -> PagedKVCacheManagerInterface:
        """Pages of both caches."""
        return self._kv_manager

    @property
    def pipeline_config(self) -> PipelineConfig:
        """The configuration that the model was built from."""
        return self.model.pipeline_config

    @property
    def tokenizer(self) -> Any:
        """The target's tokenizer, None where the caller has its own."""
        return self._tokenizer

    @property
    def max_batch_size(self) -> int:
        """Most rows in one step, of each replica."""
        return self.model.max_batch_size

    def execute(
        self, inputs: TextGenerationInputs[TextContext]
    ) -> dict[RequestID, TextGenerationOutput]:
        """Runs one step: every row moves on by a prefill chunk or by 1 to K + 1 tokens.

        Args:
            inputs: a batch for each replica; its requests' pages are allocated.

        Returns:
            The new tokens of each request, none for a chunk before the last, and their log
            probabilities where it asks for them.
        """
        start = perf_counter()
        contexts = inputs.flat_batch
        rows = [self.model.batch.row(context) for context in contexts]
        decoding = not any(map(in_prefill, contexts, rows))
        if self.speculation is not None:
            self._plan(self.speculation, contexts, rows)
        width = max((len(row.drafts) for row in rows), default=0)
        computed = self.compute(inputs.batches, width)
        outputs, num_accepted = computed.outputs, computed.num_accepted
        next_tokens = computed.next_tokens
        # A target alone puts out the drafts that it was given.
        proposals = computed.proposals[:, : self.model.most_proposed]
        num_proposed = proposals.shape[1]
        if self.model.batch.deferred is not None:
            self.model.batch.deferred.settle(contexts, num_accepted.tolist())
        probs = outputs.next_draft_probs_full
        all_probs = None if probs is None else probs.to_numpy()
        asked = any(row.sampling.num_logprobs for row in rows)
        logprobs = StepLogprobs(outputs) if asked else None

        results: dict[RequestID, TextGenerationOutput] = {}
        for index, (context, row) in enumerate(zip(contexts, rows, strict=True)):
            context.spec_decoding_state.draft_tokens_to_verify = []
            wanted = row.sampling.num_logprobs
            if context.tokens.actively_chunked:
                context.tokens.advance_chunk()
                row.drafts = []
            else:
                emitted = [
                    *row.drafts[: int(num_accepted[index])],
                    int(next_tokens[index]),
                ]
                found = logprobs.of(index, emitted, wanted) if logprobs and wanted else ()
                self._commit(context, row, emitted, found)
                if self.speculation is not None:
                    self.speculation.learn(row, emitted)
                row.drafts = self._usable(context, proposals[index].tolist())
                row.draft_probs = None if all_probs is None else all_probs[index].copy()
            if not context.is_done:
                self._kv_manager.step(context)
            elif self.speculation is not None:
                self.speculation.finished(context, row)
            output = results[context.request_id] = context.to_generation_output()
            if wanted and not output.tokens:
                # MAX's server joins outputs only where all of them have a list.
                output.log_probabilities = []
        self.last_step = StepTimes(
            start,
            perf_counter(),
            computed.graph_s,
            is_decode=decoding,
            num_rows=len(rows),
            num_verified=width,
            num_proposed=num_proposed,
        )
        return results

    def compute(self, batches: Sequence[Sequence[TextContext]], width: int) -> Computed:
        """Executes the graph for requests as they are, and changes none of them.

        Args:
            batches: of each replica.
            width: the most drafts that a row has.
        """
        for context in chain.from_iterable(batches):
            # The cache manager sizes a step's reads by the number of drafts it sees here.
            context.spec_decoding_state.draft_tokens_to_verify = [VOID_TOKEN] * width
        cache = self._kv_manager.runtime_inputs(batches)
        step = self.model.prepare_initial_token_inputs(batches, cache)
        before = perf_counter()
        outputs = self.model.execute(step)
        # What is read has been computed.
        arrays = (
            outputs.num_accepted_draft_tokens.to_numpy(),
            outputs.next_tokens.to_numpy(),
            outputs.next_draft_tokens.to_numpy(),
        )
        return Computed(outputs, *arrays, perf_counter() - before)

    def release(self, request_id: RequestID) -> None:
        """Forgets a request; its pages are the caller's to release."""
        row = self.model.batch.rows.pop(request_id, None)
        if row is not None and row.speculation is not None:
            row.speculation.drop_text()

    def _plan(
        self, speculation: Speculation, contexts: Sequence[TextContext], rows: Sequence[Row]
    ) -> None:
        self.model.batch.num_speculative_tokens = speculation.plan(contexts, rows)
        for context, row in zip(contexts, rows, strict=True):
            row.drafts = self._usable(context, row.drafts)

    def _usable(self, context: TextContext, drafts: list[int]) -> list[int]:
        """In a thinking block, the drafts up to its end: acceptance is strict behind it."""
        if self.thinking is None or not context.in_reasoning_phase:
            return drafts
        return self.thinking.up_to_end(drafts)

    def _commit(
        self,
        context: TextContext,
        row: Row,
        emitted: Sequence[int],
        logprobs: Sequence[LogProbabilities],
    ) -> None:
        """Emits the accepted run and the token after it, up to the first that ends the request."""
        if row.drafts:
            row.acceptance.verified(len(row.drafts), len(emitted) - 1)
        # The first token follows a prompt, which may have opened a thinking block.
        followed = 0 if row.generated == 0 else len(context.tokens)
        for token, found in zip_longest(emitted, logprobs):
            context.advance_token_buffer(token, found)
            row.emit(token)
            if context.is_done:
                break
        if self.thinking is not None:
            context.in_reasoning_phase = self.thinking.inside(
                context.tokens.all[followed:].tolist(), context.in_reasoning_phase
            )
