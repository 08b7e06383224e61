"""The pipeline as MAX's registry builds it, for MAX's scheduler or `max generate`."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from max.driver import is_virtual_device_mode, load_devices
from max.engine import InferenceSession
from max.graph.weights import load_weights
from max.pipelines.context import TextContext, TextGenerationOutput
from max.pipelines.kv_cache import PagedKVCacheManagerInterface
from max.pipelines.lib import MemoryPlan, PipelineConfig
from max.pipelines.modeling.types import TextGenerationInputs
from max.pipelines.request import RequestID

from unispec.checkpoints import draft_config, kimi_config
from unispec.encodings import WeightEncodings
from unispec.kv_cache.manager import make_cache_manager
from unispec.pipelines.runtime.metrics import Acceptance
from unispec.pipelines.runtime.pipeline import SpeculativePipeline
from unispec.pipelines.runtime.rows import Row, make_row
from unispec.pipelines.runtime.speculating import SpeculationOptions, speculate
from unispec.pipelines.runtime.thinking import ThinkingTokens
from unispec.pipelines.unified.model import UnifiedModel

from .draft import resolve_draft
from .grammars import ServedGrammars
from .max_serving import SpecDecodeMetrics
from .output import ServedOutput
from .pages import planned_pages
from .preempted import PreemptedRows
from .tokenizer import ServedTokenizer

__all__ = ["ServedPipeline"]

# MAX's server shows what its own loggers say, and no others.
logger = logging.getLogger("max.pipelines.unispec")

# A worker that unpickles a pipeline's configuration reads each config.json anew, before anything
# here is called.
kimi_config.register_with_transformers()
draft_config.register_with_transformers()


class ServedPipeline(SpeculativePipeline):
    """Runs the steps of MAX's scheduler; what fails in one fails its requests and nothing else.

    On a virtual device the graph is compiled and nothing is allocated; no step can run.

    Args:
        pipeline_config: of target, draft and server.
        pipeline_model: the class of the pair.
        weight_adapters: not used, the checkpoints' names are known.
        tokenizer: the target's.
        memory_plan: rows, length and memory of the cache.
        encodings: see `StepModel`.
        num_looked_up: likewise.
        speculation: how many tokens steps propose and verify; None: as `pipeline_config` has it.
        compiled: see `StepModel`.
        captures_steps: see `SpeculativePipeline`.

    Raises:
        InputError: a checkpoint that does not fit, or no memory for the cache.
    """

    def __init__(
        self,
        pipeline_config: PipelineConfig,
        pipeline_model: type[UnifiedModel],
        weight_adapters: Any,
        tokenizer: ServedTokenizer,
        memory_plan: MemoryPlan,
        encodings: WeightEncodings | None = None,
        num_looked_up: int = 0,
        speculation: SpeculationOptions | None = None,
        compiled: Path | None = None,
        captures_steps: bool = False,
    ) -> None:
        pipeline_model = resolve_draft(pipeline_config, pipeline_model)
        devices = load_devices(list(memory_plan.require_device_specs()))
        session = InferenceSession(devices=[*devices])
        # Only a target alone has room to ask for: a pair has that for its draft.
        room: Any = {"num_looked_up": num_looked_up} if num_looked_up else {}
        pipeline_config.configure_session(session)
        model = pipeline_model(
            pipeline_config,
            session,
            list(devices),
            pipeline_config.model.kv_cache,
            load_weights(pipeline_config.model.resolved_weight_paths()),
            memory_plan=memory_plan,
            max_batch_size=memory_plan.planned_max_batch_size,
            encodings=encodings,
            compiled=compiled,
            **room,
        )
        exact = tokenizer.longest_in_cache is not None
        super().__init__(
            model,
            _allocate(model, memory_plan, exact=exact),
            tokenizer,
            _thinking(pipeline_config, tokenizer),
            captures_steps=captures_steps,
        )
        if speculation is not None and not is_virtual_device_mode():
            speculate(
                self,
                speculation,
                num_pages=planned_pages(model.kv_params, memory_plan, exact=exact),
                max_length=model.arch_config.get_max_seq_len(),
                vocab_size=tokenizer.vocab_size,
                on_measure=lambda: logger.info("Measuring what steps cost"),
            )
        self._vocab_size = tokenizer.vocab_size
        self._grammars = ServedGrammars(
            tokenizer.delegate, tokenizer.vocab_size, tokenizer.eos_token_ids
        )
        # The scheduler looks for it under this name.
        self._structured_output = self._grammars.gate
        self._preempted = PreemptedRows()
        self._verified = Acceptance()

    def execute(
        self, inputs: TextGenerationInputs[TextContext]
    ) -> dict[RequestID, TextGenerationOutput]:
        """Runs one step, whatever happens in it.

        Returns:
            For each request that brought tokens or ended a `ServedOutput`; none for a prefill
            chunk. A request that failed has its last output here, see `ServedOutput.failed`; its
            pages are the caller's to release, as after any last output.
        """
        self._verified = Acceptance()
        failed = [context for context in inputs.flat_batch if not self._has_row(context)]
        outputs: dict[RequestID, TextGenerationOutput] = {}
        lost = {context.request_id for context in failed}
        batches = [[one for one in each if one.request_id not in lost] for each in inputs.batches]
        if any(batches):
            try:
                outputs |= self._step(TextGenerationInputs(batches=batches))
            except (KeyboardInterrupt, SystemExit):
                raise
            except BaseException:  # a library's own may be no Exception
                logger.exception("A step failed; its %d requests end here:", sum(map(len, batches)))
                failed = inputs.flat_batch
        return outputs | {context.request_id: self._fail(context) for context in failed}

    def release(self, request_id: RequestID) -> None:
        """Forgets a request; the row of one that comes back after preemption is kept."""
        row = self.model.batch.rows.pop(request_id, None)
        if row is not None:
            self._preempted.keep(request_id, row)

    def batch_spec_decode_metrics(self) -> SpecDecodeMetrics | None:
        """What the last step verified, for MAX's log and metrics; None without a draft."""
        width = int(self.model.kv_params.num_draft_tokens)
        if not width:
            return None
        counts = self._verified.accepted_at
        return SpecDecodeMetrics(
            num_speculative_tokens=width,
            accepted_per_position=[*counts, *[0] * (width - len(counts))],
            num_verifications=self._verified.verifications,
        )

    def _step(
        self, inputs: TextGenerationInputs[TextContext]
    ) -> dict[RequestID, TextGenerationOutput]:
        rows = self.model.batch.rows
        before = {
            context.request_id: rows[context.request_id].acceptance.totals
            for context in inputs.flat_batch
        }
        outputs: dict[RequestID, TextGenerationOutput] = {}
        for request_id, output in super().execute(inputs).items():
            drafted, accepted = rows[request_id].acceptance.since(before[request_id])
            if drafted:
                self._verified.verified(drafted, accepted)
            # A prefill chunk has no tokens: sent on, it would count as the answer's first part.
            if output.tokens or output.is_done:
                planned = rows[request_id].speculation
                source = planned.source if planned is not None and drafted else None
                outputs[request_id] = ServedOutput.of(
                    output, drafted=drafted, accepted=accepted, source=source
                )
        return outputs

    def _has_row(self, context: TextContext) -> bool:
        """Whether the request has a row now; one that cannot be made is logged."""
        rows = self.model.batch.rows
        if context.request_id in rows:
            return True
        try:
            rows[context.request_id] = self._preempted.take(context) or self._new_row(context)
        except Exception:  # a grammar's compiler has errors of its own
            logger.exception("Request %s cannot be answered:", context.request_id)
            return False
        self._preempted.watch(context)
        return True

    def _new_row(self, context: TextContext) -> Row:
        return make_row(
            context.sampling_params,
            context.tokens.prompt,
            self._vocab_size,
            logit_bias=getattr(context, "logit_bias", None),
            grammar=self._grammars.start(context),
            logprobs=context.log_probabilities or None,
        )

    def _fail(self, context: TextContext) -> ServedOutput:
        self.model.batch.rows.pop(context.request_id, None)
        self._preempted.forget(context.request_id)
        failed = ServedOutput.failed(context.request_id)
        context.status = failed.final_status
        return failed


def _allocate(
    model: UnifiedModel, plan: MemoryPlan, *, exact: bool
) -> PagedKVCacheManagerInterface:
    if is_virtual_device_mode():
        return None  # type: ignore[return-value]
    return make_cache_manager(
        model.kv_params,
        num_pages=planned_pages(model.kv_params, plan, exact=exact),
        max_batch_size=plan.planned_max_batch_size,
        draft_reads_next_token=model.draft_reads_next_token(),
    )


def _thinking(config: PipelineConfig, tokenizer: ServedTokenizer) -> ThinkingTokens | None:
    speculative = config.speculative
    if speculative is None or not speculative.use_relaxed_acceptance_for_thinking:
        return None
    return ThinkingTokens.of(tokenizer.delegate, tokenizer.thinking_tokens)
