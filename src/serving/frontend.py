"""What the process that talks to clients knows of the model: how requests become contexts."""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, TypeVar

from max.pipelines.context import TokenBuffer
from max.pipelines.request import RequestID

from unispec.checkpoints.generation_config import read_generation_config
from unispec.engine import Engine, EngineConfig, Request
from unispec.engine.sampling_defaults import sampling_params
from unispec.engine.text_stream import TextStream
from unispec.errors import InputError
from unispec.pipelines.served.context import ServedContext
from unispec.sampling.token_bytes import TokenBytes

from .asked import Asked
from .config import name_of
from .refusal import Refused, shown

__all__ = ["Choice", "Frontend"]

T = TypeVar("T")


@dataclass(frozen=True)
class Choice:
    """One answer that is to be made."""

    context: ServedContext
    """What the worker runs."""
    text: TextStream
    """Turns its tokens to text."""


class Frontend:
    """Checks requests and encodes their prompts; the model itself is in the worker.

    Args:
        config: of the model.
        served_model_name: what clients call the model; None: what `name_of` makes of it.
        engine: of the same configuration; it is never loaded.

    Attributes:
        config: of the model.
        engine: checks requests, has the tokenizer and the limits.
        model_name: what clients call the model.
    """

    def __init__(self, config: EngineConfig, served_model_name: str | None, engine: Engine) -> None:
        self.config = config
        self.engine = engine
        self.model_name = served_model_name or name_of(config.model)
        self._generation_config = read_generation_config(config.model)
        longest_token = max(map(len, engine.tokenizer.get_vocab()))
        self._most_characters = engine.max_length * longest_token
        # Long requests are read beside the answers of others, one at a time.
        self._reader = ThreadPoolExecutor(1, thread_name_prefix="read-requests")

    async def beside(self, work: Callable[..., T], *arguments: Any) -> T:
        """Does what takes time without holding up answers."""
        return await asyncio.get_running_loop().run_in_executor(self._reader, work, *arguments)

    async def choices(self, asked: Asked) -> list[list[Choice]]:
        """The answers to make: of each prompt, `asked.n`.

        Raises:
            Refused: something asked that the model cannot do.
        """
        if asked.model not in (None, self.model_name):
            raise Refused(
                f"the model {shown(asked.model)} is not served here; use {self.model_name!r}",
                param="model",
                status=404,
            )
        return await self.beside(self._make, asked)

    @cached_property
    def token_bytes(self) -> TokenBytes:
        """What each token stands for."""
        return TokenBytes(self.engine.tokenizer, self.engine.vocab_size, self.engine.eos_token_ids)

    def _make(self, asked: Asked) -> list[list[Choice]]:
        self._check_tokens(asked)
        if asked.logprobs is not None:
            _ = self.token_bytes  # made here, where it holds up no answer
        return [self._of_prompt(asked, self._encode(prompt, asked)) for prompt in asked.prompts]

    def _check_tokens(self, asked: Asked) -> None:
        """Refuses tokens that the model does not have, by the parameter that names them."""
        size = self.engine.vocab_size
        named = {
            "stop_token_ids": asked.sampling.get("stop_token_ids", ()),
            "logit_bias": asked.logit_bias,
        }
        for name, tokens in named.items():
            for token in tokens:
                if not 0 <= token < size:
                    raise Refused(
                        f"{name} has token id {shown(token)}; the model's are 0 to {size - 1}",
                        param=name,
                    )

    def _of_prompt(self, asked: Asked, tokens: Sequence[int]) -> list[Choice]:
        """A prompt's answers, which differ in their seeds only."""
        seeds = [None if asked.seed is None else (asked.seed + at) % 2**64 for at in range(asked.n)]
        params = [
            sampling_params(self._generation_config, **asked.sampling, seed=seed) for seed in seeds
        ]
        request = Request(
            token_ids=tokens,
            sampling=params[0],
            grammar=asked.grammar,
            logit_bias=asked.logit_bias,
            logprobs=asked.logprobs,
        )
        try:
            checked = self.engine.check(request)
        except InputError as error:
            raise _in_clients_words(str(error)) from error
        first = ServedContext.of(checked, logit_bias=asked.logit_bias)
        first.model_name = self.model_name
        first.cache_salt = asked.cache_salt
        if asked.logprobs is not None:
            # MAX's context has no way to ask for the token's alone.
            first.log_probabilities = max(asked.logprobs, 1)
        if asked.grammar is not None:
            is_schema = asked.grammar.kind == "json_schema"
            setattr(first, "json_schema" if is_schema else "grammar", asked.grammar.text)
        contexts = [first] + [
            replace(
                first,
                request_id=RequestID(),
                tokens=TokenBuffer(first.tokens.prompt.copy()),
                sampling_params=one,
            )
            for one in params[1:]
        ]
        least = asked.sampling.get("min_new_tokens") or 0
        return [
            Choice(context, TextStream(self.engine.tokenizer, asked.stop, min_tokens=least))
            for context in contexts
        ]

    def _encode(self, prompt: Any, asked: Asked) -> list[int]:
        if isinstance(prompt, str):
            self._check_size(prompt, "prompt")
            return list(self.engine.tokenizer.encode(prompt))
        if isinstance(prompt[0], int):
            return list(prompt)
        text = self._apply_template(prompt, asked)
        self._check_size(text, "messages")
        # The template has written the special tokens.
        return list(self.engine.tokenizer.encode(text, add_special_tokens=False))

    def _apply_template(self, messages: list[Any], asked: Asked) -> str:
        tokenizer: Any = self.engine.tokenizer
        if not tokenizer.chat_template:
            raise Refused(
                f"{self.model_name} has no chat template; send the text to /v1/completions"
            )
        own = inspect.signature(tokenizer.apply_chat_template).parameters
        for name in asked.template:
            if name in own or name in ("messages", "tools", "documents"):
                raise Refused(
                    f"chat_template_kwargs has {shown(name)}, which is not the template's; leave"
                    " it out",
                    param="chat_template_kwargs",
                )
        try:
            return str(
                tokenizer.apply_chat_template(
                    messages, add_generation_prompt=True, tokenize=False, **asked.template
                )
            )
        # A template is a program that the checkpoint brings along: it can raise anything.
        except Exception as error:
            raise Refused(
                f"the model's chat template refuses the messages ({' '.join(str(error).split())})",
                param="messages",
            ) from error

    def _check_size(self, text: str, param: str) -> None:
        """Refuses what cannot fit before time is spent on it."""
        if len(text) > self._most_characters:
            raise Refused(
                f"the prompt has {len(text)} characters, more than {self.engine.max_length} tokens"
                " can hold: shorten it",
                param=param,
            )


def _in_clients_words(said: str) -> Refused:
    """What an engine says, with the names of the interface."""
    names = {
        "min_new_tokens": "min_tokens",
        "max_new_tokens": "max_tokens",
        " or max_length": "",
        " or raise max_length": "",
    }
    for ours, theirs in names.items():
        said = said.replace(ours, theirs)
    param = "min_tokens" if said.startswith("min_tokens") else None
    return Refused(said, param=param)
