"""Parameters of a request: what they may be, what is said of the others, and their table."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from unispec.sampling.grammar import Grammar
from unispec.serving.asked import Asked, read_body
from unispec.serving.parameters import CHAT, PARAMETERS, TEXT
from unispec.serving.refusal import Refused

PAGE = Path(__file__).parents[2] / "docs" / "serving.md"
MESSAGES = [{"role": "user", "content": "Hello"}]


def read(path: str = CHAT, **fields: Any) -> Asked:
    prompt = {"messages": MESSAGES} if path == CHAT else {"prompt": "Hello"}
    return read_body(json.dumps({**prompt, **fields}).encode(), path)


def refusal(path: str = CHAT, **fields: Any) -> Refused:
    with pytest.raises(Refused) as caught:
        read(path, **fields)
    assert caught.value.status == 400
    return caught.value


def table() -> str:
    """The table of docs/serving.md as the parameters have it."""
    lines = ["| parameter | path | allowed | |", "| --- | --- | --- | --- |"]
    described = {}
    for path, paths in ((CHAT, "chat"), (TEXT, "text")):
        for name, one in PARAMETERS[path].items():
            described.setdefault((name, one.allowed, one.effect), []).append(paths)
    for (name, allowed, effect), paths in described.items():
        where = "" if len(paths) == 2 else paths[0]
        lines.append(f"| `{name}` | {where} | {allowed or 'nothing'} | {effect} |")
    return "\n".join(lines)


def test_the_page_has_every_parameter() -> None:
    assert table() in PAGE.read_text(), f"docs/serving.md should have:\n{table()}"


VALUES: list[tuple[str, Any, str]] = [
    ("temperature", 3, "temperature is 3; choose 0, which takes the most probable token, or"),
    ("temperature", -1, "temperature is -1; choose"),
    ("temperature", "0.5", "temperature is '0.5'; give a number"),
    ("temperature", True, "temperature is true; give a number"),
    ("top_p", 1.5, "top_p is 1.5; choose 0 to 1"),
    ("min_p", 2, "min_p is 2; choose 0 to 1"),
    ("top_k", -2, "top_k is -2; give an integer from -1 to 2147483647"),
    ("presence_penalty", 2.5, "presence_penalty is 2.5; choose -2 to 2"),
    ("frequency_penalty", -3, "frequency_penalty is -3; choose -2 to 2"),
    ("repetition_penalty", 0, "repetition_penalty is 0; choose 1e-06 to 1e+06"),
    ("max_tokens", 0, "max_tokens is 0; give an integer from 1 to"),
    ("max_tokens", 10**30, "max_tokens is 1000"),
    ("max_tokens", 1.5, "max_tokens is 1.5; give an integer"),
    ("min_tokens", -1, "min_tokens is -1; give an integer from 0 to"),
    ("seed", 2**64, "give an integer from -9223372036854775808 to 18446744073709551615"),
    ("stop_token_ids", [5] * 65, "give at most 64 token ids"),
    ("stop", ["a" * 4000, "b"], "give at most 4000 characters in all"),
    ("logit_bias", {str(token): 1 for token in range(1025)}, "give at most 1024 token ids"),
    ("structured_outputs", {"regex": "a" * (2**18 + 1)}, "a pattern of at most 262144 characters"),
    ("seed", 1.0, "seed is 1.0; give an integer"),
    ("n", 0, "n is 0; give an integer from 1 to 8"),
    ("n", 9, "n is 9; give an integer from 1 to 8"),
    ("stop", [""], "stop is ['']; give a text or a list of texts, of at least one character"),
    ("stop", ["a"] * 65, "give at most 64 texts"),
    ("stop", "\ud800", "give a text or a list of texts"),
    ("stop_token_ids", [1.5], "stop_token_ids is [1.5]; give a list of token ids"),
    ("logit_bias", {"5": 101}, "logit_bias is {'5': 101}; choose -100 to 100 for token 5"),
    ("logit_bias", {"x": 1}, "'x' in it is no token id"),
    ("logit_bias", {"-1": 1}, "'-1' in it is no token id"),
    ("logit_bias", [1], "logit_bias is [1]; give an object"),
    ("ignore_eos", 1, "ignore_eos is 1; give true or false"),
    ("stream", "yes", "stream is 'yes'; give true or false"),
    ("response_format", {"type": "xml"}, 'whose "type" is "text", "json_object" or "json_schema"'),
    ("response_format", {"type": "json_schema"}, "give the schema as"),
    ("structured_outputs", {"choice": ["a"]}, 'give {"regex": "..."} or {"json": {...}}'),
    ("structured_outputs", {"regex": ""}, "give a pattern of whole characters, at least one"),
    ("structured_outputs", {"json": "{"}, "its schema is no JSON"),
    ("logprobs", 5, "logprobs is 5; give true or false"),
    ("top_logprobs", 21, "top_logprobs is 21; give an integer from 0 to 20"),
    ("top_logprobs", 3, "top_logprobs is 3, which needs logprobs"),
    ("stream_options", {"include_usage": True}, "stream_options needs stream"),
    ("chat_template_kwargs", [], "chat_template_kwargs is []; give an object"),
    ("cache_salt", "", "cache_salt is ''; give a text of 1 to 512 characters"),
    ("tools", [{"type": "function"}], "this server calls no tools: leave it out"),
    ("tool_choice", "required", "this server calls no tools"),
    ("functions", [{}], "this server calls no tools"),
    ("modalities", ["audio"], "unsupported: leave it out"),
    ("prediction", {"type": "content"}, "unsupported: leave it out"),
    ("reasoning_effort", "high", "unsupported: leave it out"),
    ("model", 5, "model is 5; give a text of whole characters"),
    (
        "tempreature",
        1,
        "'tempreature' is no parameter of /v1/chat/completions; known are messages,",
    ),
]


@pytest.mark.parametrize(("name", "value", "said"), VALUES)
def test_a_wrong_value_is_named_with_what_is_right(name: str, value: Any, said: str) -> None:
    error = refusal(**{name: value})
    assert said in str(error)
    assert error.param == name


TEXT_VALUES: list[tuple[str, Any, str]] = [
    ("logprobs", 21, "logprobs is 21; give an integer from 0 to 20"),
    ("echo", True, "echo is true; unsupported: leave it out"),
    ("suffix", "end", "suffix is 'end'; unsupported: leave it out"),
    ("best_of", 2, "best_of is 2 and n is 1; give the same"),
    ("prompt", "", "prompt is ''; give a text or token ids"),
    ("prompt", [], "prompt is []; give a text or token ids"),
    ("prompt", [[]], "none empty"),
    ("prompt", None, "prompt is null; give"),
    ("prompt", ["a", [1]], "give texts of whole characters, or lists of token ids"),
    ("prompt", ["a"] * 65, "prompt has 65 prompts; give at most 64"),
    ("prompt", "\ud83d", "give texts of whole characters"),
    ("prompt", {"a": 1}, "give a text or token ids"),
    ("tools", [], "'tools' is no parameter of /v1/completions"),
]


@pytest.mark.parametrize(("name", "value", "said"), TEXT_VALUES)
def test_a_wrong_value_of_a_completion(name: str, value: Any, said: str) -> None:
    assert said in str(refusal(TEXT, **{name: value}))


@pytest.mark.parametrize(
    ("messages", "said"),
    [
        (None, "messages is missing or empty"),
        ([], "messages is missing or empty"),
        (["hi"], "messages[0] is no object"),
        ([{"role": "robot", "content": "x"}], "messages[0].role is 'robot'; choose system,"),
        ([{"role": "user"}], "messages[0].content is null; give a text"),
        ([{"role": "user", "content": "\udc00"}], "give a text of whole characters"),
        (
            [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}],
            "messages[0].content[0] is of type 'image_url'; this server reads text only",
        ),
        ([*MESSAGES, {"role": "assistant", "tool_calls": [{}]}], "messages[1] calls tools"),
    ],
)
def test_wrong_messages(messages: Any, said: str) -> None:
    assert said in str(refusal(messages=messages))


@pytest.mark.parametrize(
    ("raw", "said"),
    [
        (b"", "the body is no valid JSON"),
        (b"{", "the body is no valid JSON"),
        (b"\xff\xfe", "the body is no valid JSON"),
        (b"[]", "the body is no JSON object"),
        (b"null", "the body is no JSON object"),
        (b"[" * 100_000, "the body is no valid JSON"),
        (b'{"temperature": NaN}', "NaN is no number of JSON"),
        (b'{"top_k": ' + b"9" * 5000 + b"}", "the body is no valid JSON"),
    ],
)
def test_a_body_that_is_no_request(raw: bytes, said: str) -> None:
    for path in (CHAT, TEXT):
        with pytest.raises(Refused) as caught:
            read_body(raw, path)
        assert said in str(caught.value)


def test_what_is_asked_arrives() -> None:
    asked = read(
        messages=[
            {"role": "developer", "content": "Be brief."},
            {
                "role": "user",
                "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}],
            },
        ],
        temperature=0,
        top_k=5,
        seed=0,
        max_completion_tokens=7,
        min_tokens=2,
        stop="end",
        logit_bias={"5": -100},
        n=3,
        stream=True,
        stream_options={"include_usage": True},
        logprobs=True,
        top_logprobs=4,
        return_token_ids=True,
        cache_salt="mine",
        chat_template_kwargs={"enable_thinking": False},
        response_format={"type": "json_object"},
        user="somebody",
        presence_penalty=None,
    )
    assert asked == Asked(
        path=CHAT,
        model=None,
        prompts=[[{"role": "system", "content": "Be brief."}, {"role": "user", "content": "ab"}]],
        sampling={"temperature": 0.0, "top_k": 5, "max_new_tokens": 7, "min_new_tokens": 2},
        seed=0,
        stop=["end"],
        grammar=Grammar(kind="json_schema", text='{"type": "object"}'),
        grammar_from="response_format",
        logit_bias={5: -100.0},
        n=3,
        logprobs=4,
        stream=True,
        include_usage=True,
        return_token_ids=True,
        cache_salt="mine",
        template={"enable_thinking": False},
    )


@pytest.mark.parametrize(
    ("prompt", "prompts"),
    [("a", ["a"]), (["a", "b"], ["a", "b"]), ([1, 2], [[1, 2]]), ([[1], [2, 3]], [[1], [2, 3]])],
)
def test_prompts_of_a_completion(prompt: Any, prompts: Any) -> None:
    asked = read(TEXT, prompt=prompt)
    assert asked.prompts == prompts
    assert asked.sampling["max_new_tokens"] == 16


def test_a_chat_has_no_limit_of_its_own() -> None:
    assert read().sampling["max_new_tokens"] is None
    assert read().seed is None


@pytest.mark.parametrize("logprobs", [None, 0, 5])
def test_log_probabilities_of_a_completion(logprobs: int | None) -> None:
    assert read(TEXT, logprobs=logprobs).logprobs == logprobs


def test_patterns_and_schemas() -> None:
    assert read(structured_outputs={"regex": "a+"}).grammar == Grammar(kind="regex", text="a+")
    schema = {"type": "string"}
    of_format = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    for fields in ({"response_format": of_format}, {"structured_outputs": {"json": schema}}):
        grammar = read(**fields).grammar
        assert grammar is not None and json.loads(grammar.text) == schema
    both = refusal(response_format=of_format, structured_outputs={"regex": "a"})
    assert "exclude each other" in str(both)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.sampled_from([2**70]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)
NAMES = st.sampled_from(sorted({*PARAMETERS[CHAT], *PARAMETERS[TEXT], "messages", "prompt"}))


@given(st.sampled_from([CHAT, TEXT]), st.dictionaries(NAMES | st.text(), JSON, max_size=6))
def test_whatever_is_sent_is_read_or_refused(path: str, fields: dict[str, Any]) -> None:
    start: dict[str, Any] = {"messages": MESSAGES} if path == CHAT else {"prompt": [5]}
    try:
        read_body(json.dumps({**start, **fields}).encode(), path)
    except Refused as error:
        assert error.status == 400 and len(str(error)) < 2000
        json.loads(error.body)


@given(st.binary(max_size=200))
def test_whatever_bytes_are_sent_are_read_or_refused(raw: bytes) -> None:
    with pytest.raises(Refused):
        read_body(raw, CHAT)
