"""The target's tokenizer in a server: prompts to requests, with every check that one needs.

A request leaves the API process only if the model worker can run it.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from reprlib import repr as shown
from typing import Any

import numpy as np
import numpy.typing as npt
from max.pipelines.context import EOSTracker, SamplingParams, TextContext
from max.pipelines.context.exceptions import InputError as RequestError
from max.pipelines.lib import PIPELINE_REGISTRY, PipelineConfig, TextTokenizer
from max.pipelines.modeling.types import TextGenerationRequest, TokenIds
from transformers import PreTrainedTokenizerFast

from unispec.checkpoints.generation_config import read_eos_token_ids
from unispec.checkpoints.tokenizer import read_tokenizer
from unispec.errors import InputError
from unispec.pipelines.runtime.contexts import make_context
from unispec.pipelines.runtime.model import StepModel
from unispec.pipelines.runtime.rows import check_vocabulary
from unispec.pipelines.runtime.sampling_params import check_logprobs, check_sampling, is_integer

from .checks import check_server
from .context import ServedContext
from .max_serving import without_stopwatch
from .refusals import refuse_unsupported

__all__ = ["ServedTokenizer"]

_NAME = "the prompt"


class ServedTokenizer(TextTokenizer):
    """Reads the tokenizer as an engine does, and makes and checks contexts.

    It crosses to the model worker, by pickling.

    Args:
        model_path: folder or repository of the target.
        pipeline_config: of target, draft and server.
        max_length: longest sequence, prompt and answer, in tokens; None: the model's.
        chat_template: stands in for the checkpoint's own.
        options: MAX's, for reading the tokenizer otherwise; not used.

    Attributes:
        delegate: the tokenizer itself.
        vocab_size: V, the width of the logits.
        longest_in_cache: longest sequence that the cache holds, in tokens; None: any.
        thinking_tokens: what opens and closes a thinking block, for relaxed acceptance.

    Raises:
        InputError: a tokenizer file that is missing or damaged, or what `check_server` refuses.
    """

    def __init__(
        self,
        model_path: str,
        pipeline_config: PipelineConfig,
        *,
        max_length: int | None = None,
        chat_template: str | None = None,
        **options: Any,
    ) -> None:
        check_server(pipeline_config)
        # MAX's own reads by transformers' AutoTokenizer, which has no class for some models.
        hf: Any = pipeline_config.model.huggingface_config
        self.model_path = model_path
        self.delegate: PreTrainedTokenizerFast = read_tokenizer(model_path, hf.model_type)
        if chat_template is not None:
            self.delegate.chat_template = chat_template
        self.vocab_size = int(hf.get_text_config().vocab_size)
        architecture: Any = PIPELINE_REGISTRY.architecture_for_config(pipeline_config)
        self._model: type[StepModel] = architecture.pipeline_model
        self.max_length = max_length or self._model.calculate_max_seq_len(pipeline_config, hf)
        self.longest_in_cache: int | None = None
        self.thinking_tokens = ("<think>", "</think>")
        self._hf = hf
        self._eos = read_eos_token_ids(model_path, hf)
        self._has_tool_parser = pipeline_config.runtime.tool_parser is not None

    @property
    def tokenizer_vocab_size(self) -> int:
        """V: an answer may have tokens that the tokenizer does not name."""
        return self.vocab_size

    @property
    def eos_token_ids(self) -> set[int]:
        """What ends an answer, by the target's own files."""
        return set(self._eos)

    def apply_chat_template(
        self, messages: list[Any], tools: list[Any] | None, **chat_template_options: Any
    ) -> str:
        """A conversation as text, up to where the answer begins.

        Raises:
            max.pipelines.context.exceptions.InputError: the template refuses it.
        """
        if not self.delegate.chat_template:
            raise RequestError("this model has no chat template: send a prompt, not messages")
        options = {"add_generation_prompt": True, **chat_template_options}
        turns = [message.flatten_content() for message in messages]
        try:
            return str(
                self.delegate.apply_chat_template(turns, tools=tools, tokenize=False, **options)
            )
        # A template is a program that the checkpoint brings along: it can raise anything.
        except Exception as error:
            raise RequestError(f"the chat template refuses the messages ({error})") from error

    async def encode(
        self, prompt: str | Sequence[int], add_special_tokens: bool = True
    ) -> npt.NDArray[np.integer[Any]]:
        """Token ids int64 `[n]` of a text; those of a list as they are."""
        if not isinstance(prompt, str):
            return np.array(list(prompt), np.int64)
        # Half a character that JSON may carry is none in UTF-8.
        text = prompt.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
        read = partial(self.delegate.encode, text, add_special_tokens=add_special_tokens)
        return np.array(await asyncio.to_thread(read), np.int64)

    async def decode(self, encoded: TokenIds, **kwargs: Any) -> str:
        """The text of token ids."""
        return str(self.delegate.decode(np.asarray(encoded).tolist(), **kwargs))

    async def create_eos_tracker(self, request: TextGenerationRequest) -> EOSTracker:
        """What ends the answer: tokens in the model worker, texts in the API process."""
        params = request.sampling_params
        ends = set(params.stop_token_ids or ())
        if not params.ignore_eos:
            ends |= self._eos
        return EOSTracker(eos_token_ids=ends, eos_stop_strings=params.stop or [])

    async def new_context(self, request: TextGenerationRequest) -> TextContext:
        """The request as the model worker takes it.

        Raises:
            max.pipelines.context.exceptions.InputError: whatever is wrong with it, in one
                sentence; MAX's server answers it with status 400.
        """
        try:
            refuse_unsupported(request, has_tool_parser=self._has_tool_parser)
            return self.served_context(request, await self._tokens(request))
        except InputError as error:
            raise RequestError(str(error)) from error

    def served_context(
        self, request: TextGenerationRequest, tokens: Sequence[int]
    ) -> ServedContext:
        """The request with an encoded prompt, all but its texts checked.

        Raises:
            InputError: an empty prompt, a token outside the vocabulary, a length or sampling
                parameters that cannot be used, or what stands for an image.
        """
        params = _comparable(request.sampling_params)
        check_sampling(params)
        check_logprobs(request.logprobs)
        if not tokens:
            raise InputError(f"{_NAME} is empty; give at least one token")
        named = (min(tokens), max(tokens), *(params.stop_token_ids or ()))
        check_vocabulary(named, self.vocab_size)
        params = _sendable(params, self.max_length)
        schema, grammar = _constraints(request)
        plain = make_context(
            self._model.read_prompt(self._hf, tokens, (), name=_NAME),
            params,
            name=_NAME,
            max_length=self.max_length,
            vocab_size=self.vocab_size,
            eos_token_ids=self._eos,
            has_grammar=bool(grammar) or schema is not None,
        )
        longest = self.longest_in_cache
        if longest is not None and plain.max_length > longest:
            raise InputError(
                f"{_NAME} and its answer may be {plain.max_length} tokens long and the cache holds"
                f" {longest}: lower max_new_tokens, or start the server with more cache pages"
            )
        ends = plain.eos_tracker.eos_token_ids
        return ServedContext.of(
            plain,
            request_id=request.request_id,
            eos_tracker=EOSTracker(eos_token_ids=ends, eos_stop_strings=params.stop or []),
            json_schema=schema,
            grammar=grammar,
            log_probabilities=request.logprobs,
            model_name=request.model_name,
            target_endpoint=request.target_endpoint,
            cache_salt=request.cache_salt,
        )

    async def _tokens(self, request: TextGenerationRequest) -> list[int]:
        if isinstance(request.prompt, str):
            return list(map(int, await self.encode(request.prompt)))
        if request.prompt is not None:
            return _token_ids(request.prompt)
        text = await asyncio.to_thread(
            self.apply_chat_template,
            request.messages,
            request.tools,
            **(request.chat_template_options or {}),
        )
        # The template writes the special tokens.
        return list(map(int, await self.encode(text, add_special_tokens=False)))


def _token_ids(prompt: Sequence[Any]) -> list[int]:
    for token in prompt:
        if not is_integer(token):
            raise InputError(f"{_NAME} has {shown(token)} among its token ids; give integers")
    return [int(token) for token in prompt]


def _comparable(params: SamplingParams) -> SamplingParams:
    """Sampling parameters without what `max generate` measures itself with."""
    if not params.logits_processors:
        return params
    return replace(params, logits_processors=without_stopwatch(params.logits_processors) or None)


def _sendable(params: SamplingParams, max_length: int) -> SamplingParams:
    """The same parameters in integers of 64 bits, which is all that a message holds."""
    count = params.max_new_tokens
    return replace(
        params,
        seed=int(params.seed) % 2**64,
        max_new_tokens=None if count is None else min(int(count), max_length),
    )


def _constraints(request: TextGenerationRequest) -> tuple[str | None, str | None]:
    """The JSON schema, as text, and the regex that the answer has to match."""
    asked = request.response_format
    if asked is None:
        return None, None
    schema = None if asked.json_schema is None else json.dumps(asked.json_schema)
    return schema, asked.grammar
