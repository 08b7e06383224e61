"""The pipeline that drives a unified graph: one call of `execute`, one step of the batch."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from itertools import chain, zip_longest
from time import perf_counter
from typing import Any

import numpy as np
import numpy.typing as npt
from max.pipelines.context import LogProbabilities, TextContext, TextGenerationOutput
from max.pipelines.kv_cache import PagedKVCacheManagerInterface
from max.pipelines.lib import PipelineConfig
from max.pipelines.lib.pipeline_variants.text_generation import TextGenerationPipelineInterface
from max.pipelines.modeling.types import PipelineTokenizer, TextGenerationInputs
from max.pipelines.request import RequestID

from unispec.pipelines.speculative.step import VOID_TOKEN

from .ahead import LookAhead
from .draft_probs import DraftProbs
from .launched import Launched
from .logprobs import StepLogprobs
from .metrics import StepTimes
from .model import StepModel
from .readback import Readback, Reading
from .rows import Row, in_prefill
from .speculation import Speculation
from .thinking import ThinkingTokens

__all__ = ["SpeculativePipeline"]

# MAX's server shows what its own loggers say, and no others.
logger = logging.getLogger("max.pipelines.unispec")


class SpeculativePipeline(TextGenerationPipelineInterface[TextContext]):
    """Runs mixed batches of prefill chunks and decode rows on a CPU or a GPU.

    The caller claims and allocates a request's pages before its step and releases
    them after its last one, as MAX's scheduler does.

    Args:
        kv_manager: pages of both caches.
        tokenizer: the target's tokenizer, for callers of this pipeline.
        thinking: what a graph with relaxed acceptance knows thinking blocks by; None: the
            caller sets `in_reasoning_phase` of the contexts.
        captures_steps: on a GPU: whether decode steps that come again and again are recorded, see
            `LookAhead`.
        has_reserved_pages: whether a request has pages for its longest length, see `LookAhead`.

    Attributes:
        speculation: decides what each step verifies and proposes; None: a step verifies what the
            draft proposed in the last one, and proposes `model.batch.num_speculative_tokens`.
        last_step: when the last step was; None before the first.
        ahead: enqueues decode steps before the last one was read; None, as at first on a CPU, whose
            graph has ended when the host goes on: nobody does.
    """

    def __init__(
        self,
        model: StepModel,
        kv_manager: PagedKVCacheManagerInterface,
        tokenizer: PipelineTokenizer[Any, Any, Any] | None = None,
        thinking: ThinkingTokens | None = None,
        *,
        captures_steps: bool = False,
        has_reserved_pages: bool = False,
    ) -> None:
        self._model = self._pipeline_model = model
        self._devices = model.devices
        self._kv_manager = kv_manager
        self._tokenizer = tokenizer
        self.thinking = thinking
        self.speculation: Speculation | None = None
        self.last_step: StepTimes | None = None
        device = model.batch.device
        self.ahead = (
            None
            if device.is_host
            else LookAhead(
                model, kv_manager, captures=captures_steps, has_reserved_pages=has_reserved_pages
            )
        )
        # What a CPU's graph puts out can be read where it is.
        self._reading = Reading if device.is_host else Readback(device).start
        self._read_s = 0.0

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
        launched, places = self._launched(inputs.batches, contexts, rows)
        self._follow(launched, places, contexts, rows)
        report, graph_s = self._read(launched)
        report = report[places]
        num_accepted, next_tokens = report[:, 0], report[:, 1]
        # A target alone puts out the drafts that it was given.
        proposals = report[:, 2 : 2 + self.model.most_proposed]
        if self.model.batch.deferred is not None:
            self.model.batch.deferred.settle(contexts, num_accepted.tolist())
        probs = launched.outputs.next_draft_probs_full
        asked = any(row.sampling.num_logprobs for row in rows)
        logprobs = StepLogprobs(launched.outputs) if asked else None

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
                row.draft_probs = None if probs is None else DraftProbs(probs, places[index])
            if not context.is_done:
                self._kv_manager.step(context)
            elif self.speculation is not None:
                self.speculation.finished(context, row)
            output = results[context.request_id] = context.to_generation_output()
            if wanted and not output.tokens:
                # MAX's server joins outputs only where all of them have a list.
                output.log_probabilities = []
        if self.ahead is not None:
            drafts = [row.drafts for row in rows]
            self.ahead.has_read(dict(zip(results, drafts, strict=True)))
        self.last_step = StepTimes(
            start,
            perf_counter(),
            graph_s,
            is_decode=decoding,
            num_rows=len(rows),
            num_verified=launched.width,
            num_proposed=proposals.shape[1],
        )
        return results

    def launch(self, batches: Sequence[Sequence[TextContext]], width: int) -> Launched:
        """Executes the graph for requests as they are, and changes none of them.

        Args:
            batches: of each replica.
            width: the most drafts that a row has.
        """
        if self.ahead is not None:
            self.ahead.forget()
        contexts = list(chain.from_iterable(batches))
        for context in contexts:
            # The cache manager sizes a step's reads by the number of drafts it sees here.
            context.spec_decoding_state.draft_tokens_to_verify = [VOID_TOKEN] * width
        cache = self._kv_manager.runtime_inputs(batches)
        step = self.model.prepare_initial_token_inputs(batches, cache)
        began = perf_counter()
        outputs = self.model.execute(step)
        return Launched(
            request_ids=[context.request_id for context in contexts],
            inputs=step,
            outputs=outputs,
            reading=self._reading(outputs.report),
            width=width,
            proposals=self.model.batch.num_speculative_tokens,
            began_s=began,
        )

    def release(self, request_id: RequestID) -> None:
        """Forgets a request; its pages are the caller's to release."""
        row = self.model.batch.rows.pop(request_id, None)
        if row is not None and row.speculation is not None:
            row.speculation.drop_text()
        if self.ahead is not None and not self.model.batch.rows:
            self.ahead.forget()

    def _launched(
        self,
        batches: Sequence[Sequence[TextContext]],
        contexts: Sequence[TextContext],
        rows: Sequence[Row],
    ) -> tuple[Launched, list[int]]:
        """The step that was enqueued ahead, if it is the one that is wanted, or a new one.

        Returns:
            The step, and the row that each request has in it.
        """
        batch = self.model.batch
        if self.ahead is not None:
            taken = self.ahead.take(contexts, rows, batch.num_speculative_tokens)
            if taken is not None:
                if batch.deferred is not None:
                    batch.deferred.all_read(contexts)
                return taken
        width = max((len(row.drafts) for row in rows), default=0)
        return self.launch(batches, width), list(range(len(contexts)))

    def _follow(
        self,
        launched: Launched,
        places: Sequence[int],
        contexts: Sequence[TextContext],
        rows: Sequence[Row],
    ) -> None:
        """Enqueues the next step, where the batch is the launched one, row by row."""
        if self.ahead is None or [*places] != [*range(len(launched.request_ids))]:
            return
        try:
            self.ahead.follow(launched, contexts, rows, self._foreseen(rows), self._reading)
        except Exception:  # the step that runs is a good one
            logger.exception("A step could not be enqueued ahead, so none will be from now on:")
            self.ahead = None

    def _foreseen(self, rows: Sequence[Row]) -> int | None:
        """How many tokens a row the next step will most likely propose; None: unknown."""
        if self.speculation is None:
            return self.model.batch.num_speculative_tokens
        return self.speculation.foreseen(len(rows))

    def _read(self, launched: Launched) -> tuple[npt.NDArray[np.int64], float]:
        """A step's report, and the seconds that its graph took, reading included."""
        report = launched.reading.wait()
        # What was enqueued ahead began when the step before it had ended.
        began, self._read_s = max(launched.began_s, self._read_s), perf_counter()
        return report, self._read_s - began

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
