"""The engine: loads a model and answers prompts on this machine."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

from max.driver import load_devices
from max.engine import InferenceSession
from max.graph.weights import SafetensorWeights
from max.pipelines.context import EOSTracker, TextContext
from transformers import PreTrainedTokenizerFast

from unispec.checkpoints.generation_config import read_eos_token_ids
from unispec.checkpoints.tokenizer import read_tokenizer
from unispec.errors import InputError
from unispec.kv_cache.manager import make_cache_manager, pages_per_row
from unispec.pipelines.architectures.registry import pipeline_model
from unispec.sampling.grammar import CompiledGrammar, Grammar, GrammarCompiler

from .config import EngineConfig
from .metrics import RunMetrics
from .pipeline import SpeculativePipeline
from .requests import Report, Request
from .rows import make_row
from .run import Run
from .scheduler import Scheduler
from .text_stream import TextStream
from .thinking import ThinkingTokens

__all__ = ["Engine"]

_CACHE_BYTES = 4 << 30


class Engine:
    """A target and its draft, ready to answer prompts.

    Building one reads configurations and the tokenizer only; the weights are read and
    the graph is compiled on the first `generate`, after its requests were checked.

    Args:
        config: what to load.
        on_progress: gets the name of each phase of loading as it begins.

    Attributes:
        tokenizer: The target's tokenizer.
        max_length: Longest sequence, prompt and output, in tokens.
        reads_images: Whether a request may have images.
        eos_token_ids: Tokens that end an answer, unless its request ignores them.
        num_pages: Cache pages in all.

    Raises:
        InputError: a model or draft that cannot be used.
    """

    def __init__(
        self, config: EngineConfig, *, on_progress: Callable[[str], None] | None = None
    ) -> None:
        self._config = config
        self._progress = on_progress or (lambda phase: None)
        self._progress("reading configuration")
        self._pipeline_config = config.pipeline_config(weights=False)
        self._model_class = pipeline_model(self._pipeline_config)
        self.reads_images = self._model_class.reads_images
        hf: Any = self._pipeline_config.model.huggingface_config
        self.max_length = self._model_class.calculate_max_seq_len(self._pipeline_config, hf)
        # Reading both configurations here reports their errors before anything slow starts.
        arch_config: Any = self._model_class.model_config_cls
        arch = arch_config.initialize(self._pipeline_config, max_seq_len=self.max_length)
        self._kv_params = arch.get_kv_params()
        self._vocab_size = int(hf.get_text_config().vocab_size)
        self.eos_token_ids = read_eos_token_ids(config.model, hf)
        self.tokenizer: PreTrainedTokenizerFast = read_tokenizer(config.model, hf.model_type)
        self._thinking = (
            ThinkingTokens.of(self.tokenizer, config.thinking_tokens)
            if config.use_relaxed_acceptance_for_thinking
            else None
        )
        self._progress("finding the weights")
        config.add_weights(self._pipeline_config)
        self._grammars: GrammarCompiler | None = None
        self._pipeline: SpeculativePipeline | None = None
        self.num_pages = self._count_pages()

    @property
    def pipeline(self) -> SpeculativePipeline:
        """The pipeline; reads the weights and compiles the graph when first asked for."""
        if self._pipeline is None:
            self._pipeline = self._load()
        return self._pipeline

    def generate(
        self,
        requests: Sequence[Request],
        *,
        on_text: Callable[[int, str], None] | None = None,
        on_finish: Callable[[int], None] | None = None,
    ) -> Report:
        """Answers the requests, batched as they fit; one that is refused refuses all of the call.

        All are checked before any begins, images included, so a refused call leaves those that
        run alone.

        Args:
            requests: in the order of the report's results.
            on_text: gets a request's index and its new text as soon as it is certain.
            on_finish: gets a request's index when its answer is complete.

        Raises:
            InputError: an empty prompt, one that leaves no room for an answer, a token
                outside the vocabulary, an image that cannot be read or has no placeholder, a
                placeholder without an image, or a grammar that cannot be compiled.
        """
        contexts = [self._context(index, request) for index, request in enumerate(requests)]
        grammars = [self._compile_grammar(request.grammar) for request in requests]
        pipeline = self.pipeline
        pipeline.metrics = RunMetrics()
        scheduler = Scheduler(
            pipeline.kv_manager,
            num_pages=self.num_pages,
            max_batch_size=self._config.max_batch_size,
            max_batch_input_tokens=self._config.max_batch_input_tokens,
        )
        run = Run(
            pipeline,
            scheduler,
            contexts,
            [TextStream(self.tokenizer, request.sampling.stop or ()) for request in requests],
            on_text or (lambda index, text: None),
            on_finish or (lambda index: None),
        )
        for request, context, grammar in zip(requests, contexts, grammars, strict=True):
            pipeline.model.batch.rows[context.request_id] = make_row(
                context,
                self._vocab_size,
                logit_bias=request.logit_bias,
                grammar=grammar.start() if grammar else None,
            )
        return run.finish_all()

    def _context(self, index: int, request: Request) -> TextContext:
        if not request.token_ids:
            raise InputError(f"prompt {index + 1} is empty; give at least one token")
        prompt = self._model_class.read_prompt(
            self._pipeline_config.model.huggingface_config,
            request.token_ids,
            request.images,
            name=f"prompt {index + 1}",
        )
        length = len(prompt.tokens)
        if length >= self.max_length:
            raise InputError(
                f"prompt {index + 1} has {length} tokens, max_length is {self.max_length} and an"
                " answer needs at least one more: shorten the prompt or raise max_length"
            )
        named = (*request.logit_bias, *(request.sampling.stop_token_ids or ()))
        for token in (min(request.token_ids), max(request.token_ids), *named):
            if not 0 <= token < self._vocab_size:
                raise InputError(
                    f"prompt {index + 1}: token id {token} is outside the model's vocabulary of"
                    f" {self._vocab_size}; use the tokenizer that belongs to the model"
                )
        for token, bias in request.logit_bias.items():
            if not math.isfinite(bias):
                raise InputError(
                    f"prompt {index + 1}: the logit_bias of token {token} is {bias}; give a finite"
                    " number, -100 all but bans a token"
                )
        params = request.sampling
        if params.max_new_tokens is not None and params.max_new_tokens < 1:
            raise InputError(f"max_new_tokens is {params.max_new_tokens}; choose at least 1")
        limit = self.max_length - length
        max_length = length + min(params.max_new_tokens or limit, limit)
        if params.min_new_tokens > max_length - length:
            raise InputError(
                f"min_new_tokens is {params.min_new_tokens}, but prompt {index + 1} has room for"
                f" {max_length - length} new tokens: lower it, or raise max_new_tokens or"
                " max_length"
            )
        needed = pages_per_row(self._kv_params, max_length)
        if needed > self.num_pages:
            raise InputError(
                f"prompt {index + 1} and its answer of up to {max_length - length} tokens need"
                f" {needed} cache pages, kv_cache_pages is {self.num_pages}: lower max_new_tokens"
                " or raise kv_cache_pages"
            )
        eos = set() if params.ignore_eos else self.eos_token_ids | set(params.stop_token_ids or ())
        return prompt.context(
            max_length=max_length,
            eos_tracker=EOSTracker(eos_token_ids=eos),
            sampling_params=params,
            vocab_size=self._vocab_size,
        )

    def _compile_grammar(self, grammar: Grammar | None) -> CompiledGrammar | None:
        if grammar is None:
            return None
        if self._grammars is None:
            self._grammars = GrammarCompiler(
                self.tokenizer, self._vocab_size, sorted(self.eos_token_ids)
            )
        return self._grammars.compile(grammar)

    def _count_pages(self) -> int:
        one_row = pages_per_row(self._kv_params, self.max_length)
        asked = self._config.kv_cache_pages
        if asked is not None:
            return asked
        affordable = _CACHE_BYTES // int(self._kv_params.bytes_per_block)
        return max(1, min(one_row * self._config.max_batch_size, affordable))

    def _load(self) -> SpeculativePipeline:
        config = self._pipeline_config
        devices = load_devices(config.model.device_specs)
        session = InferenceSession(devices=[*devices])
        paths = config.model.resolved_weight_paths()
        self._progress("loading weights and compiling the graph")
        model = self._model_class(
            config,
            session,
            list(devices),
            config.model.kv_cache,
            # Named for the documented signature; the model reads the files itself.
            SafetensorWeights([path for path in paths if path.suffix == ".safetensors"]),
            max_batch_size=self._config.max_batch_size,
        )
        self._progress("allocating the cache")
        manager = make_cache_manager(
            model.kv_params,
            session,
            num_pages=self.num_pages,
            max_batch_size=self._config.max_batch_size,
            draft_reads_next_token=model.draft_reads_next_token,
        )
        return SpeculativePipeline(model, manager, thinking=self._thinking)
