"""A request's body, read and checked."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final, NoReturn, TypeAlias

from unispec.pipelines.runtime.sampling_params import is_integer
from unispec.sampling.grammar import Grammar

from .parameters import CHAT, MAX_ROWS, PARAMETERS, is_text
from .refusal import Refused, shown

__all__ = ["Asked", "Message", "read_body"]

Message: TypeAlias = dict[str, str]
"""A turn of a conversation: `role` and `content`."""

_ROLES: Final = ("system", "developer", "user", "assistant")
_MAX_MESSAGES: Final = 4096
_MAX_PROMPTS: Final = 64
_COMPLETION_TOKENS: Final = 16
"""What OpenAI's interface has where `max_tokens` is left out of a completion."""


@dataclass(frozen=True, kw_only=True)
class Asked:
    """What a client wants."""

    path: str
    """`CHAT` or `TEXT`."""
    model: str | None
    """The model's name; None: whatever is served."""
    prompts: list[str] | list[list[int]] | list[list[Message]]
    """Texts, token ids, or a single conversation."""
    sampling: Mapping[str, Any]
    """Fields of `SamplingParams` that were set, but for the seed and the stop texts."""
    seed: int | None
    """Of the first answer to each prompt, the next one has the next; None: random."""
    stop: list[str]
    """Each ends an answer."""
    grammar: Grammar | None
    """What the answer has to match."""
    grammar_from: str | None
    """The parameter that has it."""
    logit_bias: dict[int, float]
    """Added to the logits of these token ids."""
    n: int
    """Answers to each prompt."""
    logprobs: int | None
    """How many alternatives each token has; None: no log probabilities."""
    stream: bool
    """Whether the answer comes piece by piece."""
    include_usage: bool
    """Whether a stream ends with its usage."""
    return_token_ids: bool
    """Whether token ids are part of the answer."""
    cache_salt: str | None
    """Only prompts with the same share cached pages."""
    template: Mapping[str, Any] = field(default_factory=dict)
    """Variables of the chat template."""

    @property
    def rows(self) -> int:
        """Answers in all."""
        return len(self.prompts) * self.n


def read_body(raw: bytes, path: str) -> Asked:
    """Reads a request.

    Args:
        raw: what the client sent.
        path: `CHAT` or `TEXT`.

    Raises:
        Refused: it is no JSON object, or a parameter is unknown or has a value that is not allowed.
    """
    body = _object(raw)
    prompts = _conversation(body) if path == CHAT else _prompts(body)
    known = PARAMETERS[path]
    taken: dict[str, Any] = {}
    for name, value in body.items():
        if name in ("messages", "prompt"):
            continue
        if name not in known:
            raise Refused(
                f"{shown(name)} is no parameter of {path}; known are"
                f" {', '.join(['messages' if path == CHAT else 'prompt', *known])}",
                param=name if is_text(name) else None,
            )
        # A null stands for the default, as OpenAI's clients send it.
        if value is not None:
            taken[name] = known[name].take(value)
    n = taken.get("n", 1)
    if len(prompts) * n > MAX_ROWS:
        raise Refused(
            f"{len(prompts)} prompts with n {n} are {len(prompts) * n} answers; ask for at most"
            f" {MAX_ROWS} in a request",
            param="n",
        )
    if taken.get("best_of", n) != n:
        raise Refused(f"best_of is {taken['best_of']} and n is {n}; give the same", param="best_of")
    return Asked(
        path=path,
        model=taken.get("model"),
        prompts=prompts,
        sampling=_sampling(taken, path),
        seed=taken.get("seed"),
        stop=taken.get("stop", []),
        grammar=_grammar(taken),
        grammar_from="response_format" if taken.get("response_format") else "structured_outputs",
        logit_bias=taken.get("logit_bias", {}),
        n=n,
        logprobs=_logprobs(taken, path),
        stream=taken.get("stream", False),
        include_usage=_include_usage(taken),
        return_token_ids=taken.get("return_token_ids", False),
        cache_salt=taken.get("cache_salt"),
        template=taken.get("chat_template_kwargs", {}),
    )


def _object(raw: bytes) -> dict[str, Any]:
    try:
        body = json.loads(raw, parse_constant=_no_constant)
    except json.JSONDecodeError as error:
        raise Refused(f"the body is no valid JSON ({error})") from None
    except UnicodeDecodeError as error:
        raise Refused(f"the body is no valid JSON: byte {error.start} is no UTF-8") from None
    except RecursionError:
        raise Refused("the body is no valid JSON for this server: it is nested too deep") from None
    except ValueError as error:
        text = str(error) if "no number" in str(error) else "a number has too many digits"
        raise Refused(f"the body is no valid JSON for this server: {text}") from None
    if not isinstance(body, dict):
        raise Refused("the body is no JSON object; send one")
    return body


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no number of JSON")


def _conversation(body: dict[str, Any]) -> list[list[Message]]:
    messages = body.get("messages")
    if not isinstance(messages, list) or not messages:
        raise Refused(
            "messages is missing or empty; give a list of at least one message", param="messages"
        )
    if len(messages) > _MAX_MESSAGES:
        raise Refused(
            f"messages has {len(messages)} messages; give at most {_MAX_MESSAGES}",
            param="messages",
        )
    return [[_message(message, f"messages[{at}]") for at, message in enumerate(messages)]]


def _message(message: Any, name: str) -> Message:
    def refuse(what: str) -> NoReturn:
        raise Refused(f"{name}{what}", param=name)

    if not isinstance(message, dict):
        refuse(' is no object; give {"role": "user", "content": "..."}')
    role = message.get("role")
    if role not in _ROLES:
        refuse(f".role is {shown(role)}; choose {', '.join(_ROLES)}")
    if message.get("tool_calls") or message.get("function_call"):
        refuse(" calls tools, which this server does not have; leave them out")
    content = message.get("content")
    if isinstance(content, list):
        content = "".join(_part(part, f"{name}.content[{at}]") for at, part in enumerate(content))
    if not is_text(content):
        refuse(f".content is {shown(content)}; give a text of whole characters")
    # A chat template knows the older of the two names.
    return {"role": "system" if role == "developer" else str(role), "content": str(content)}


def _part(part: Any, name: str) -> str:
    kind = part.get("type") if isinstance(part, dict) else None
    if kind not in ("text", "input_text"):
        raise Refused(
            f"{name} is of type {shown(kind)}; this server reads text only: give"
            ' {"type": "text", "text": "..."}',
            param=name,
        )
    if not is_text(part.get("text")):
        raise Refused(
            f"{name}.text is {shown(part.get('text'))}; give a text of whole characters", param=name
        )
    return str(part["text"])


def _prompts(body: dict[str, Any]) -> list[str] | list[list[int]]:
    prompt = body.get("prompt")
    prompts: Any = [prompt] if isinstance(prompt, str) else prompt
    if isinstance(prompts, list) and prompts and all(map(is_integer, prompts)):
        prompts = [prompts]
    if not isinstance(prompts, list) or not prompts or any(not one for one in prompts):
        raise Refused(
            f"prompt is {shown(prompt)}; give a text or token ids, or a list of them, none empty",
            param="prompt",
        )
    if len(prompts) > _MAX_PROMPTS:
        raise Refused(
            f"prompt has {len(prompts)} prompts; give at most {_MAX_PROMPTS}", param="prompt"
        )
    are_ids = all(isinstance(one, list) and all(map(is_integer, one)) for one in prompts)
    if not are_ids and not all(map(is_text, prompts)):
        raise Refused(
            f"prompt is {shown(prompt)}; give texts of whole characters, or lists of token ids",
            param="prompt",
        )
    return prompts


def _sampling(taken: Mapping[str, Any], path: str) -> dict[str, Any]:
    limits = [taken[name] for name in ("max_tokens", "max_completion_tokens") if name in taken]
    if len(set(limits)) > 1:
        raise Refused(
            f"max_tokens is {limits[0]} and max_completion_tokens is {limits[1]}; give one",
            param="max_tokens",
        )
    default = None if path == CHAT else _COMPLETION_TOKENS
    most, least = limits[0] if limits else default, taken.get("min_tokens", 0)
    if most is not None and least > most:
        raise Refused(
            f"min_tokens is {least}, but there is room for {most} tokens; lower it or raise"
            " max_tokens",
            param="min_tokens",
        )
    fields = {
        "max_new_tokens": most,
        "min_new_tokens": taken.get("min_tokens"),
    }
    same = (
        "temperature",
        "top_k",
        "top_p",
        "min_p",
        "presence_penalty",
        "frequency_penalty",
        "repetition_penalty",
        "stop_token_ids",
        "ignore_eos",
    )
    return fields | {name: taken[name] for name in same if name in taken}


def _grammar(taken: Mapping[str, Any]) -> Grammar | None:
    of_format = taken.get("response_format")
    of_vllm = taken.get("structured_outputs")
    if of_format is not None and of_vllm is not None:
        raise Refused(
            "response_format and structured_outputs exclude each other; give one",
            param="structured_outputs",
        )
    return of_format or of_vllm


def _logprobs(taken: Mapping[str, Any], path: str) -> int | None:
    if path != CHAT:
        return taken.get("logprobs")
    wanted: bool = taken.get("logprobs", False)
    top: int = taken.get("top_logprobs", 0)
    if top and not wanted:
        raise Refused(
            f"top_logprobs is {top}, which needs logprobs; give logprobs: true",
            param="top_logprobs",
        )
    return top if wanted else None


def _include_usage(taken: Mapping[str, Any]) -> bool:
    if "stream_options" in taken and not taken.get("stream"):
        raise Refused("stream_options needs stream; give stream: true", param="stream_options")
    return bool(taken.get("stream_options", False))
