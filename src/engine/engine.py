"""The engine: loads a model and answers prompts on this machine."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence, Set
from pathlib import Path
from time import perf_counter
from typing import Any

from max.driver import load_devices
from max.engine import InferenceSession
from max.graph.weights import SafetensorWeights
from max.pipelines.context import TextContext
from max.pipelines.kv_cache import PagedKVCacheManagerInterface
from max.pipelines.request import RequestID
from transformers import PreTrainedTokenizerFast

from unispec.batch_schedule import BatchSchedule
from unispec.checkpoints.generation_config import read_eos_token_ids
from unispec.checkpoints.tokenizer import read_tokenizer
from unispec.errors import InputError
from unispec.kv_cache.manager import make_cache_manager, with_room
from unispec.methods import AUTO, DRAFTLESS, Method, check_num_speculative_tokens
from unispec.new_folder import new_folder
from unispec.pipelines.architectures.registry import pipeline_model
from unispec.pipelines.runtime.metrics import StepTimes
from unispec.pipelines.runtime.pipeline import SpeculativePipeline
from unispec.pipelines.runtime.speculating import DraftCount, SpeculationOptions, speculate
from unispec.pipelines.runtime.thinking import ThinkingTokens
from unispec.pipelines.unified.model import UnifiedModel

from .answer import Answer, Outbox
from .cache_pages import count_pages
from .config import EngineConfig
from .device_memory import check_device_memory
from .factory import AnswerFactory
from .model_files import add_weights
from .pipeline_config import make_pipeline_config, weight_encodings
from .reading import read_request, read_requests
from .reporting import report_on, report_on_speculation
from .requests import Output, Report, Request, Step
from .running import RunningBatch
from .scheduler import Scheduler, check_pages
from .steps import StepOptions

__all__ = ["Engine"]


class Engine:
    """A target and its draft, ready to answer prompts.

    Building one reads configurations and the tokenizer only; the weights are read and
    the graph is compiled by `load`, or on first use, after the first requests were checked.

    Any number of threads may use an engine: all requests take part in one batch, and join it
    between two steps. `generate` answers some requests and returns. `add`, `step` and `abort`
    are for a caller with a loop of its own, such as a server.

    Args:
        on_progress: gets the name of each phase of loading as it begins.

    Attributes:
        tokenizer: the target's.
        max_length: longest sequence, prompt and output, in tokens.
        reads_images: whether a request may have images.
        num_pages: cache pages in all.
        speculative_method: of the draft, EAGLE in its generation; None without one.
        max_speculative_tokens: largest `num_speculative_tokens`; 0 without a draft.

    Raises:
        InputError: a model or draft that cannot be used.
    """

    def __init__(
        self, config: EngineConfig, *, on_progress: Callable[[str], None] | None = None
    ) -> None:
        self._config = config
        self._progress = on_progress or (lambda phase: None)
        self._progress("reading configuration")
        self._pipeline_config = make_pipeline_config(config, weights=False)
        self._model_class = pipeline_model(self._pipeline_config)
        self.reads_images = self._model_class.reads_images
        method = self._model_class.method
        self.speculative_method: Method | None = None if method is None else method.name
        if config.speculative_method in DRAFTLESS:
            self.speculative_method = config.speculative_method
        hf: Any = self._pipeline_config.model.huggingface_config
        self.max_length = self._model_class.calculate_max_seq_len(self._pipeline_config, hf)
        # Reading both configurations here reports their errors before anything slow starts.
        arch_config: Any = self._model_class.model_config_cls
        self._arch_config = arch_config.initialize(
            self._pipeline_config, max_seq_len=self.max_length
        )
        self._kv_params = with_room(self._arch_config.get_kv_params(), config.num_looked_up)
        self.tokenizer: PreTrainedTokenizerFast = read_tokenizer(config.model, hf.model_type)
        self._answers = AnswerFactory(
            self._model_class,
            hf,
            self.tokenizer,
            max_length=self.max_length,
            eos_token_ids=read_eos_token_ids(config.model, hf),
        )
        self._thinking = (
            ThinkingTokens.of(self.tokenizer, config.thinking_tokens)
            if config.use_relaxed_acceptance_for_thinking
            else None
        )
        self._progress("finding the weights")
        add_weights(self._pipeline_config, config)
        self._running: RunningBatch | None = None
        self._loading = threading.Lock()
        self._added = Outbox(goes_on=False)
        self.max_speculative_tokens = int(self._kv_params.num_draft_tokens)
        self._first_count = config.loaded_count(self.max_speculative_tokens)
        self._options = StepOptions(self._first_count)
        self.num_pages = count_pages(config, self._kv_params, self.max_length)

    def load(self) -> None:
        """Reads the weights and compiles the graph now, if no request made it do so before.

        Raises:
            InputError: a checkpoint that does not fit.
        """
        self._batch()

    def compile(self, folder: Path) -> None:
        """Compiles the graph and writes it to a folder, for `EngineConfig.compiled`.

        Where MAX's devices are virtual, no engine can use this one for anything else.

        Args:
            folder: a new or empty one.

        Raises:
            InputError: a checkpoint that does not fit, a folder that cannot be written, or the
                engine has a compiled graph.
        """
        if self._config.compiled is not None:
            raise InputError(
                f"{self._config.compiled} has the graph compiled already: leave compiled out"
            )
        with new_folder(folder) as working:
            self._load_model(compile_to=working)

    @property
    def pipeline(self) -> SpeculativePipeline:
        """The pipeline; loads when first asked for."""
        return self._batch().pipeline

    @property
    def scheduler(self) -> Scheduler:
        """Which requests run next; loads when first asked for."""
        return self._batch().scheduler

    @property
    def unfinished(self) -> int:
        """Requests of `add` whose last output `step` has not returned yet."""
        return len(self._added.unfinished)

    @property
    def num_speculative_tokens(self) -> DraftCount:
        """K, how many tokens are proposed in a step, 1 to `max_speculative_tokens`.

        `"auto"` lets each step choose, which needs an engine whose configuration says so, too; a
        `BatchSchedule` has a K by the number of requests. It may be set at any time, from any
        thread, and holds for the steps that begin from then on. 0 without a speculative method.

        Raises:
            InputError: it is set to another number, or there is no speculative method.
        """
        return self._options.num_speculative_tokens

    @num_speculative_tokens.setter
    def num_speculative_tokens(self, count: DraftCount) -> None:
        largest = count.largest if isinstance(count, BatchSchedule) else count
        check_num_speculative_tokens(
            self._config.speculative_method, largest, loaded=self.max_speculative_tokens
        )
        if count == AUTO != self._first_count:
            raise InputError(
                "num_speculative_tokens is 'auto', but this engine was built for"
                f" {self._first_count}; build it with 'auto'"
            )
        self._options.num_speculative_tokens = count

    @property
    def vocab_size(self) -> int:
        """V, the width of the model's logits; token ids are below it."""
        return self._answers.vocab_size

    @property
    def eos_token_ids(self) -> Set[int]:
        """Tokens that end an answer, unless its request ignores them; may be set for others."""
        return self._answers.eos_token_ids

    @eos_token_ids.setter
    def eos_token_ids(self, token_ids: Set[int]) -> None:
        self._answers.eos_token_ids = token_ids

    @property
    def on_step(self) -> Callable[[Step], None] | None:
        """Gets each step of the batch when it has run, before its outputs are handed out.

        It is called in the thread that runs the steps, so it may not call what waits for a step:
        `generate`, `step`, `abort` and `reset_prefix_cache`. What it raises fails the requests of
        the step. It may be set at any time, from any thread; None, as at first, calls nothing.
        """
        return self._options.on_step

    @on_step.setter
    def on_step(self, hook: Callable[[Step], None] | None) -> None:
        if hook is not None and not callable(hook):
            raise InputError(f"on_step is {hook!r}; give a function of a Step, or None")
        self._options.on_step = hook

    @property
    def num_requests(self) -> int:
        """Requests of all callers that have a row, or wait for one."""
        return 0 if self._running is None else len(self._running.pipeline.model.batch.rows)

    @property
    def num_free_pages(self) -> int:
        """Cache pages that no request holds, those of earlier prompts included."""
        if self._running is None:
            return self.num_pages
        return int(self._running.pipeline.kv_manager.block_count().free)

    def reset_prefix_cache(self) -> None:
        """Forgets what is cached of earlier prompts; pages that a request holds stay."""
        if self._running is not None:
            self._running.reset_prefix_cache()

    def generate(
        self,
        requests: Sequence[Request],
        *,
        on_text: Callable[[int, str], None] | None = None,
        on_finish: Callable[[int], None] | None = None,
    ) -> Report:
        """Answers the requests, batched as they fit; one that is refused refuses all of the call.

        All are checked before any begins, images included. Calls of several threads share the
        batch. Whatever is raised here, by a callback or an interrupt, takes out the requests of
        this call alone; the steps of others go on.

        Args:
            requests: in the order of the report's results.
            on_text: gets a request's index and its new text as soon as it is certain; called in
                the thread of this call.
            on_finish: gets a request's index when its answer is complete; likewise.

        Raises:
            InputError: a request of a wrong type; an empty prompt, one that leaves no room for an
                answer, a token outside the vocabulary, sampling parameters that cannot be used,
                an image that cannot be read or has no placeholder, a placeholder without an
                image, or a grammar that cannot be compiled.
            Exception: what a step raised that had a request of this call.
        """
        outbox = Outbox(goes_on=True)
        answers = [
            self._answer(request, f"prompt {at}", outbox)
            for at, request in enumerate(read_requests(requests), start=1)
        ]
        batch = self._batch()
        indices = {answer.request_id: at for at, answer in enumerate(answers)}
        steps: list[StepTimes] = []
        start = perf_counter()
        try:
            batch.add(outbox, answers)
            while outbox.unfinished:
                for output in batch.step(outbox):
                    if output.error is not None:
                        raise output.error
                    index = indices[output.request_id]
                    if output.step is not None and output.step not in steps[-1:]:
                        steps.append(output.step)
                    if output.text and on_text is not None:
                        on_text(index, output.text)
                    if output.result is not None and on_finish is not None:
                        on_finish(index)
        finally:
            batch.abort(outbox, outbox.unfinished)
        return report_on(
            answers,
            steps,
            started_s=start,
            ended_s=perf_counter(),
            speculation=report_on_speculation(
                batch.pipeline.speculation, self.num_speculative_tokens, answers, steps
            ),
        )

    def check(self, request: Request) -> TextContext:
        """What a batch would run of a request that passes the checks of `add`.

        Nothing is loaded, and its grammar is not compiled: for a program whose steps run in
        another process.

        Raises:
            InputError: as for `generate`, but for the grammar.
        """
        name = "the prompt"
        context = self._answers.check(read_request(request, name), name)
        self._check_pages(context, name)
        return context

    def add(self, request: Request) -> RequestID:
        """Lets a request take part from the next step on, if it passes the checks.

        Returns:
            What its outputs are called.

        Raises:
            InputError: as for `generate`.
        """
        name = "the prompt"
        answer = self._answer(read_request(request, name), name, self._added)
        batch = self._batch()
        try:
            batch.add(self._added, [answer])
        except BaseException:  # an interrupt: nobody would know of the request
            batch.abort(self._added, [answer.request_id])
            raise
        return answer.request_id

    def step(self) -> list[Output]:
        """Runs one step of the batch, unless outputs of requests of `add` wait already.

        An interrupt (Ctrl-C) while this waits loses nothing: the outputs wait for the next call.

        An error of a step is an output of each request that it had; the others, and the engine,
        go on.

        Returns:
            What one step brought for requests of `add`, the first whose outputs wait; a step that
            reads a part of a long prompt brings nothing, and none is run where no request is
            unfinished.
        """
        return self._batch().step(self._added) if self.unfinished else []

    def abort(self, request_id: RequestID) -> None:
        """Takes a request of `add` out, if it is still there; nothing follows of it.

        What it held is free when this returns.
        """
        if request_id in self._added.unfinished:
            self._batch().abort(self._added, [request_id])

    def _batch(self) -> RunningBatch:
        with self._loading:
            if self._running is None:
                pipeline = self._load()
                scheduler = Scheduler(
                    pipeline.kv_manager,
                    num_pages=self.num_pages,
                    max_batch_size=self._config.max_batch_size,
                    max_batch_input_tokens=self._config.max_batch_input_tokens,
                )
                self._running = RunningBatch(pipeline, scheduler, self._options)
            return self._running

    def _answer(self, request: Request, name: str, outbox: Outbox) -> Answer:
        answer = self._answers.make(request, name, outbox)
        self._check_pages(answer.context, name)
        return answer

    def _check_pages(self, context: TextContext, name: str) -> None:
        try:
            check_pages(self._kv_params, context.max_length, self.num_pages)
        except InputError as error:
            raise InputError(f"{name}: {error}") from error

    def _load(self) -> SpeculativePipeline:
        # On a CPU first: it is set to zero while the weights are read.
        manager = self._allocate() if self._config.devices == "cpu" else None
        model = self._load_model()
        pipeline = SpeculativePipeline(
            model,
            manager or self._allocate(),
            thinking=self._thinking,
            captures_steps=self._config.device_graph_capture,
            has_reserved_pages=True,
        )
        if self.speculative_method is not None:
            speculate(
                pipeline,
                SpeculationOptions(self._first_count, self._config.lookup),
                num_pages=self.num_pages,
                max_length=self.max_length,
                vocab_size=self.vocab_size,
                on_measure=lambda: self._progress("measuring what steps cost"),
            )
        return pipeline

    def _load_model(self, compile_to: Path | None = None) -> UnifiedModel:
        config, compiled = self._pipeline_config, self._config.compiled
        devices = load_devices(config.model.device_specs)
        session = InferenceSession(devices=[*devices])
        paths = config.model.resolved_weight_paths()
        # Only a target alone has room to ask for: a pair has that for its draft.
        looked_up = self._config.num_looked_up
        room: Any = {"num_looked_up": looked_up} if looked_up else {}
        graph = "compiling the graph" if compiled is None else "the compiled graph"
        check_device_memory(
            config,
            self._arch_config,
            cache=self.num_pages * int(self._kv_params.bytes_per_block),
            device=devices[0],
        )
        self._progress(f"loading weights and {graph}")
        return self._model_class(
            config,
            session,
            list(devices),
            config.model.kv_cache,
            # Named for the documented signature; the model reads the files itself.
            SafetensorWeights([path for path in paths if path.suffix == ".safetensors"]),
            max_batch_size=self._config.max_batch_size,
            encodings=weight_encodings(self._config),
            compiled=compiled,
            compile_to=compile_to,
            **room,
        )

    def _allocate(self) -> PagedKVCacheManagerInterface:
        self._progress("allocating the cache")
        return make_cache_manager(
            self._kv_params,
            num_pages=self.num_pages,
            max_batch_size=self._config.max_batch_size,
            draft_reads_next_token=self._model_class.draft_reads_next_token(),
        )
