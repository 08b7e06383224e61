"""Every parameter of a request: what it may be, and what else is refused."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final

from unispec.errors import InputError
from unispec.pipelines.runtime.sampling_params import is_integer
from unispec.sampling.grammar import Grammar
from unispec.sampling.ranges import RANGES

from .refusal import Refused, shown

__all__ = ["CHAT", "MAX_CHOICES", "MAX_ROWS", "PARAMETERS", "TEXT", "Parameter", "is_text"]

CHAT: Final = "/v1/chat/completions"
"""The path of conversations."""

TEXT: Final = "/v1/completions"
"""The path of prompts without roles."""

MAX_CHOICES: Final = 8
"""Most answers to one prompt."""

MAX_ROWS: Final = 128
"""Most answers to all prompts of a request."""

_MAX_STOPS: Final = 64
_MAX_STOP_CHARACTERS: Final = 4000
_MAX_BIASES: Final = 1024
_MAX_GRAMMAR_CHARACTERS: Final = 1 << 18
_MAX_OPTIONAL_PROPERTIES: Final = 300
_MAX_TOP_LOGPROBS: Final = 20
_MAX_SALT: Final = 512
_LARGEST_COUNT: Final = 2**31 - 1


class _Wrong(Exception):
    """A value that is not allowed; what is said after the value."""


@dataclass(frozen=True)
class Parameter:
    """One field of a request's JSON object."""

    name: str
    """As the client writes it."""
    allowed: str
    """Which values it may have, in words."""
    effect: str
    """What it does, in words."""
    read: Callable[[Any], Any]
    """The value in our terms; raises `_Wrong` for another than allowed."""
    endpoints: tuple[str, ...] = (CHAT, TEXT)
    """The paths that take it."""

    def take(self, value: Any) -> Any:
        """The value in our terms.

        Raises:
            Refused: it is not allowed.
        """
        try:
            return self.read(value)
        except _Wrong as wrong:
            raise Refused(f"{self.name} is {shown(value)}; {wrong}", param=self.name) from wrong
        except InputError as error:
            raise Refused(f"{self.name}: {error}", param=self.name) from error


def is_text(value: Any) -> bool:
    """Whether it is a string of characters; half a surrogate pair is none."""
    if not isinstance(value, str):
        return False
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True


def _within(low: int, high: int) -> Callable[[Any], int]:
    def read(value: Any) -> int:
        if not is_integer(value) or not low <= value <= high:
            raise _Wrong(f"give an integer from {low} to {high}")
        return int(value)

    return read


def _number(name: str) -> Callable[[Any], float]:
    def read(value: Any) -> float:
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise _Wrong(f"give a number, {RANGES[name]}")
        if not RANGES[name].holds(value):
            raise _Wrong(f"choose {RANGES[name]}")
        return float(value)

    return read


def _flag(value: Any) -> bool:
    if not isinstance(value, bool):
        raise _Wrong("give true or false")
    return value


def _text(value: Any) -> str:
    if not is_text(value):
        raise _Wrong("give a text of whole characters")
    return str(value)


def _salt(value: Any) -> str:
    if not is_text(value) or not 1 <= len(value) <= _MAX_SALT:
        raise _Wrong(f"give a text of 1 to {_MAX_SALT} characters")
    return str(value)


def _stop(value: Any) -> list[str]:
    texts = [value] if isinstance(value, str) else value
    if not isinstance(texts, list) or not all(is_text(text) and text for text in texts):
        raise _Wrong("give a text or a list of texts, of at least one character each")
    if len(texts) > _MAX_STOPS:
        raise _Wrong(f"give at most {_MAX_STOPS} texts")
    if sum(map(len, texts)) > _MAX_STOP_CHARACTERS:
        raise _Wrong(f"give at most {_MAX_STOP_CHARACTERS} characters in all")
    return texts


def _token_ids(value: Any) -> list[int]:
    if not isinstance(value, list) or not all(map(is_integer, value)):
        raise _Wrong("give a list of token ids")
    if len(value) > _MAX_STOPS:
        raise _Wrong(f"give at most {_MAX_STOPS} token ids")
    return value


def _logit_bias(value: Any) -> dict[int, float]:
    if not isinstance(value, dict):
        raise _Wrong('give an object of token ids and numbers, {"42": -100}')
    if len(value) > _MAX_BIASES:
        raise _Wrong(f"give at most {_MAX_BIASES} token ids")
    bias = {}
    for token, added in value.items():
        if not (token.isascii() and token.isdecimal() and len(token) < 10):
            raise _Wrong(f"{shown(token)} in it is no token id")
        if isinstance(added, bool) or not isinstance(added, int | float) or not abs(added) <= 100:
            raise _Wrong(f"choose -100 to 100 for token {token}")
        bias[int(token)] = float(added)
    return bias


def _schema(schema: Any) -> Grammar:
    if not isinstance(schema, dict):
        raise _Wrong("give a JSON schema, which is an object")
    try:
        text = json.dumps(schema)
        optional = _optional_properties(schema)
    except RecursionError:
        raise _Wrong("it is nested too deep") from None
    if len(text) > _MAX_GRAMMAR_CHARACTERS:
        raise _Wrong(f"give a schema of at most {_MAX_GRAMMAR_CHARACTERS} characters")
    if optional > _MAX_OPTIONAL_PROPERTIES:
        raise _Wrong(
            f"it has {optional} properties that are not required; make it at most"
            f" {_MAX_OPTIONAL_PROPERTIES}"
        )
    return Grammar(kind="json_schema", text=text)


def _optional_properties(schema: Any) -> int:
    """How many properties of a schema's objects may be left out; compiling takes their square."""
    if isinstance(schema, list):
        return sum(map(_optional_properties, schema))
    if not isinstance(schema, dict):
        return 0
    properties, required = schema.get("properties"), schema.get("required")
    named = properties.keys() if isinstance(properties, dict) else set()
    needed = (
        {name for name in required if isinstance(name, str)}
        if isinstance(required, list)
        else set()
    )
    return len(named - needed) + sum(map(_optional_properties, schema.values()))


def _response_format(value: Any) -> Grammar | None:
    kind = value.get("type") if isinstance(value, dict) else None
    if kind == "text":
        return None
    if kind == "json_object":
        return _schema({"type": "object"})
    if kind == "json_schema":
        stated = value.get("json_schema")
        if not isinstance(stated, dict) or not isinstance(stated.get("schema"), dict):
            raise _Wrong('give the schema as {"json_schema": {"name": ..., "schema": {...}}}')
        return _schema(stated["schema"])
    raise _Wrong('give an object whose "type" is "text", "json_object" or "json_schema"')


def _structured_outputs(value: Any) -> Grammar:
    if not isinstance(value, dict) or len(value) != 1 or next(iter(value)) not in ("json", "regex"):
        raise _Wrong('give {"regex": "..."} or {"json": {...}}')
    if "json" in value:
        schema = value["json"]
        if isinstance(schema, str):
            try:
                schema = json.loads(schema)
            except (ValueError, RecursionError):
                raise _Wrong("its schema is no JSON") from None
        return _schema(schema)
    if not is_text(value["regex"]) or not value["regex"]:
        raise _Wrong("give a pattern of whole characters, at least one")
    if len(value["regex"]) > _MAX_GRAMMAR_CHARACTERS:
        raise _Wrong(f"give a pattern of at most {_MAX_GRAMMAR_CHARACTERS} characters")
    return Grammar(kind="regex", text=value["regex"])


def _stream_options(value: Any) -> bool:
    names = {"include_usage", "include_obfuscation"}
    if not isinstance(value, dict) or not value.keys() <= names:
        raise _Wrong('give {"include_usage": true} or false')
    return _flag(value.get("include_usage", False))


def _text_logprobs(value: Any) -> int | None:
    if value is False:
        return None
    return _within(0, _MAX_TOP_LOGPROBS)(value)


def _template_arguments(value: Any) -> dict[str, Any]:
    if not isinstance(value, dict) or not all(is_text(name) for name in value):
        raise _Wrong('give an object of the chat template\'s variables, {"enable_thinking": false}')
    return value


def _only(*allowed: Any, fix: str) -> Callable[[Any], None]:
    def read(value: Any) -> None:
        if not any(type(value) is type(one) and value == one for one in allowed):
            raise _Wrong(fix)

    return read


def _sampled(name: str, effect: str) -> Parameter:
    return Parameter(name, str(RANGES[name]), effect, _number(name))


def _counted(name: str, low: int, high: int, effect: str, *endpoints: str) -> Parameter:
    allowed = f"{low} to {high}"
    return Parameter(name, allowed, effect, _within(low, high), endpoints or (CHAT, TEXT))


def _refused(name: str, *neutral: Any, endpoints: tuple[str, ...] = (CHAT, TEXT)) -> Parameter:
    """One that may have values only that ask for nothing."""
    fix = "this server calls no tools" if "tool" in name or "function" in name else "unsupported"
    allowed = " or ".join(map(json.dumps, neutral))
    read = _only(*neutral, fix=f"{fix}: leave it out")
    return Parameter(name, allowed, "Not supported.", read, endpoints)


def _ignored(name: str, effect: str = "Has no effect here.") -> Parameter:
    return Parameter(name, "anything", effect, lambda value: None)


_ALL: Final = (
    Parameter("model", "the served model", "Which model answers; may be left out.", _text),
    _counted(
        "max_tokens",
        1,
        _LARGEST_COUNT,
        "Most tokens of an answer. Default: up to the longest sequence; 16 for completions.",
    ),
    _counted("max_completion_tokens", 1, _LARGEST_COUNT, "The same.", CHAT),
    _counted(
        "min_tokens",
        0,
        _LARGEST_COUNT,
        "The answer does not end before it has so many tokens; stop texts are looked for behind"
        " them. Default: 0.",
    ),
    _sampled(
        "temperature",
        "Flattens (above 1) or sharpens the distribution; 0 takes the most probable token. "
        "Default: the checkpoint's, else 1.",
    ),
    _counted(
        "top_k",
        -1,
        _LARGEST_COUNT,
        "Sample from the k most probable tokens; -1 and 0: from all. Default: the checkpoint's, "
        "else all.",
    ),
    _sampled(
        "top_p",
        "Sample from the most probable tokens that hold this probability together. Default: the "
        "checkpoint's, else 1.",
    ),
    _sampled(
        "min_p",
        "Sample from tokens at least this probable in proportion to the most probable one. "
        "Default: 0.",
    ),
    _sampled(
        "presence_penalty", "Taken from the logit of a token once it was generated. Default: 0."
    ),
    _sampled(
        "frequency_penalty",
        "Taken from the logit of a token each time it was generated. Default: 0.",
    ),
    _sampled(
        "repetition_penalty",
        "Above 1, makes tokens that occurred less probable. Default: the checkpoint's, else 1.",
    ),
    _counted(
        "seed",
        -(2**63),
        2**64 - 1,
        "The same request with the same seed has the same answer, in any batch, with any draft. "
        "Default: random.",
    ),
    Parameter(
        "logit_bias",
        f"an object of up to {_MAX_BIASES} token ids and numbers, -100 to 100",
        "Added to the logits of these tokens.",
        _logit_bias,
    ),
    Parameter(
        "stop",
        f"a text, or up to {_MAX_STOPS} of them; {_MAX_STOP_CHARACTERS} characters in all",
        "The answer ends before the first of them.",
        _stop,
    ),
    Parameter(
        "stop_token_ids",
        f"up to {_MAX_STOPS} token ids",
        "Each ends the answer, as EOS does.",
        _token_ids,
    ),
    Parameter("ignore_eos", "true or false", "Go on after EOS. Default: false.", _flag),
    Parameter(
        "response_format",
        'an object; its `type`: `"text"`, `"json_object"`, `"json_schema"`',
        "The answer is JSON, or satisfies a schema.",
        _response_format,
    ),
    Parameter(
        "structured_outputs",
        '`{"regex": "..."}` or `{"json": {...}}`',
        "The answer matches a pattern, or satisfies a schema.",
        _structured_outputs,
    ),
    _counted(
        "n",
        1,
        MAX_CHOICES,
        "Answers to each prompt; they share its cache pages. The first is the one that `n` 1 "
        "has; with a seed, the next ones have the seeds after it.",
    ),
    Parameter(
        "stream",
        "true or false",
        "Send the answer piece by piece, as server-sent events. Default: false.",
        _flag,
    ),
    Parameter(
        "stream_options",
        '`{"include_usage": true}`',
        "Whether a stream ends with its usage.",
        _stream_options,
    ),
    Parameter(
        "logprobs",
        "true or false",
        "Give the log probability of each token, before sampling parameters.",
        _flag,
        (CHAT,),
    ),
    _counted(
        "top_logprobs",
        0,
        _MAX_TOP_LOGPROBS,
        "Give those of so many most probable tokens too; needs `logprobs`.",
        CHAT,
    ),
    Parameter(
        "logprobs",
        f"0 to {_MAX_TOP_LOGPROBS}",
        "Give the log probability of each token, before sampling parameters, and those of so "
        "many most probable ones.",
        _text_logprobs,
        (TEXT,),
    ),
    Parameter(
        "return_token_ids",
        "true or false",
        "Give the token ids of prompt and answer too. Default: false.",
        _flag,
    ),
    Parameter(
        "chat_template_kwargs",
        "an object",
        "Variables of the chat template.",
        _template_arguments,
        (CHAT,),
    ),
    Parameter(
        "cache_salt",
        f"a text of 1 to {_MAX_SALT} characters",
        "Prompts share cached pages only with others that have the same.",
        _salt,
    ),
    _counted("best_of", 1, MAX_CHOICES, "Must be `n`.", TEXT),
    _refused("echo", False, endpoints=(TEXT,)),
    _refused("suffix", "", endpoints=(TEXT,)),
    _refused("tools", [], endpoints=(CHAT,)),
    _refused("tool_choice", "none", "auto", endpoints=(CHAT,)),
    _refused("functions", [], endpoints=(CHAT,)),
    _refused("function_call", "none", "auto", endpoints=(CHAT,)),
    _refused("modalities", ["text"], endpoints=(CHAT,)),
    _refused("audio", endpoints=(CHAT,)),
    _refused("prediction", endpoints=(CHAT,)),
    _refused("web_search_options", endpoints=(CHAT,)),
    _refused("reasoning_effort", endpoints=(CHAT,)),
    _refused("verbosity", "medium", endpoints=(CHAT,)),
    _refused("store", False, endpoints=(CHAT,)),
    _ignored("user"),
    _ignored("metadata"),
    _ignored("service_tier"),
    _ignored("safety_identifier"),
    _ignored(
        "prompt_cache_key", "Has no effect here: prompts that begin alike share pages anyway."
    ),
    _ignored("parallel_tool_calls"),
)

PARAMETERS: Final[Mapping[str, Mapping[str, Parameter]]] = {
    path: {one.name: one for one in _ALL if path in one.endpoints} for path in (CHAT, TEXT)
}
"""Of each path, every parameter by its name, but for `messages` and `prompt`."""
