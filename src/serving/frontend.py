"""What the process that talks to clients knows of the model: how requests become contexts."""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from unispec.checkpoints.generation_config import read_generation_config
from unispec.engine import Engine, EngineConfig, Request
from unispec.engine.sampling_defaults import sampling_params
from unispec.engine.text_stream import TextStream
from unispec.errors import InputError
from unispec.pipelines.served.context import ServedContext

from .asked import Asked
from .parameters import shown
from .refusal import Refused

__all__ = ["Choice", "Frontend"]


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
        served_model_name: what clients call the model; None: as it was given.
        engine: of the same configuration; it is never loaded.

    Attributes:
        config: of the model.
        engine: checks requests, has the tokenizer and the limits.
        model_name: what clients call the model.
    """

    def __init__(self, config: EngineConfig, served_model_name: str | None, engine: Engine) -> None:
        self.config = config
        self.engine = engine
        self.model_name = served_model_name or config.model
        self._generation_config = read_generation_config(config.model)
        longest_token = max(map(len, engine.tokenizer.get_vocab()))
        self._most_characters = engine.max_length * longest_token
        # Long prompts are encoded beside the answers of others, one at a time.
        self._encoder = ThreadPoolExecutor(1, thread_name_prefix="encode")

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
        work = asyncio.get_running_loop().run_in_executor(self._encoder, self._make, asked)
        return await work

    def token_text(self, token: int) -> str:
        """The text of one token alone."""
        return str(self.engine.tokenizer.decode([token], skip_special_tokens=False))

    def _make(self, asked: Asked) -> list[list[Choice]]:
        try:
            return [
                [self._choice(asked, tokens, number) for number in range(asked.n)]
                for tokens in map(lambda prompt: self._encode(prompt, asked), asked.prompts)
            ]
        except InputError as error:
            raise Refused(str(error)) from error

    def _choice(self, asked: Asked, tokens: Sequence[int], number: int) -> Choice:
        seed = None if asked.seed is None else (asked.seed + number) % 2**64
        params = sampling_params(self._generation_config, **asked.sampling, seed=seed)
        request = Request(
            token_ids=tokens,
            sampling=params,
            grammar=asked.grammar,
            logit_bias=asked.logit_bias,
            logprobs=asked.logprobs,
        )
        context = ServedContext.of(self.engine.check(request), logit_bias=asked.logit_bias)
        context.model_name = self.model_name
        context.cache_salt = asked.cache_salt
        if asked.logprobs is not None:
            # MAX's context has no way to ask for the token's alone.
            context.log_probabilities = max(asked.logprobs, 1)
        if asked.grammar is not None:
            is_schema = asked.grammar.kind == "json_schema"
            setattr(context, "json_schema" if is_schema else "grammar", asked.grammar.text)
        return Choice(context, TextStream(self.engine.tokenizer, asked.stop))

    def _encode(self, prompt: Any, asked: Asked) -> list[int]:
        if isinstance(prompt, str):
            self._check_size(len(prompt))
            return list(self.engine.tokenizer.encode(prompt))
        if isinstance(prompt[0], int):
            return list(prompt)
        return self._encode_chat(prompt, asked)

    def _encode_chat(self, messages: list[Any], asked: Asked) -> list[int]:
        tokenizer: Any = self.engine.tokenizer
        self._check_size(sum(len(message["content"]) for message in messages))
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
            encoded = tokenizer.apply_chat_template(
                messages, add_generation_prompt=True, return_dict=False, **asked.template
            )
        # A template is a program that the checkpoint brings along: it can raise anything.
        except Exception as error:
            raise Refused(
                f"the model's chat template refuses the messages ({' '.join(str(error).split())})",
                param="messages",
            ) from error
        return list(encoded)

    def _check_size(self, characters: int) -> None:
        """Refuses what cannot fit before time is spent on it."""
        if characters > self._most_characters:
            raise Refused(
                f"the prompt has {characters} characters, more than {self.engine.max_length} tokens"
                " can hold: shorten it"
            )
