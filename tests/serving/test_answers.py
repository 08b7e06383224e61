"""What comes over HTTP is what the engine writes, whatever is asked and however it is sent."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from max.pipelines.context import SamplingParams
from prompts import random_prompt
from reference.distribution import target_distribution
from reference.philox import numbers
from reference.target import TargetReference
from servers import MODEL_NAME, PRESET, TEMPLATE, Served

from unispec.engine import Engine, Request, Result
from unispec.sampling.grammar import Grammar
from unispec.sampling.seeds import Stream

pytestmark = pytest.mark.compiles(PRESET)

VOCAB = 256


def prompt(number: int, length: int = 12) -> list[int]:
    return random_prompt(VOCAB, length, number)


def solo(engine: Engine, tokens: Sequence[int], **fields: Any) -> Result:
    """The engine's answer to a request of its own."""
    others = {name: fields.pop(name) for name in ("grammar", "logit_bias") if name in fields}
    fields = {"temperature": 0, "max_new_tokens": 16, **fields}
    request = Request(token_ids=tokens, sampling=SamplingParams(**fields), **others)
    return engine.generate([request]).results[0]


def complete(server: Served, tokens: Sequence[int], **fields: Any) -> dict[str, Any]:
    answer = server.complete(list(tokens), return_token_ids=True, **{"temperature": 0, **fields})
    assert answer.status_code == 200, answer.text
    body: dict[str, Any] = answer.json()
    return body


def events(text: str) -> list[dict[str, Any]]:
    """A stream's events; the last one is [DONE]."""
    *data, done, rest = text.split("\n\n")
    assert (done, rest) == ("data: [DONE]", "")
    return [json.loads(line.removeprefix("data: ")) for line in data]


@pytest.mark.parametrize("length", [1, 12, 65, 200])
def test_greedy_tokens_are_those_of_the_engine(
    server: Served, eagle_engine: Engine, length: int
) -> None:
    tokens = prompt(length, length)
    body = complete(server, tokens, max_tokens=40)
    expected = solo(eagle_engine, tokens, max_new_tokens=40)
    choice = body["choices"][0]
    assert choice["token_ids"] == expected.token_ids
    assert choice["text"] == expected.text
    assert choice["prompt_token_ids"] == tokens
    assert choice["finish_reason"] == expected.finish_reason
    usage = body["usage"]
    assert (usage["prompt_tokens"], usage["completion_tokens"]) == (length, len(expected.token_ids))
    assert usage["total_tokens"] == length + len(expected.token_ids)


def test_a_conversation_goes_through_the_chat_template(
    server: Served, eagle_engine: Engine
) -> None:
    body = server.chat("Hello", max_tokens=8, temperature=0, return_token_ids=True).json()
    tokenizer = eagle_engine.tokenizer
    tokens = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Hello"}],
        chat_template=TEMPLATE,
        add_generation_prompt=True,
        return_dict=False,
    )
    assert body["choices"][0]["prompt_token_ids"] == tokens
    expected = solo(eagle_engine, tokens, max_new_tokens=8)
    assert body["choices"][0]["message"]["content"] == expected.text
    assert body["choices"][0]["token_ids"] == expected.token_ids
    assert body["object"] == "chat.completion" and body["model"] == MODEL_NAME


def test_drafts_are_counted_as_the_engine_counts_them(server: Served, eagle_engine: Engine) -> None:
    """The engine of the tests proposes 5 tokens a step, and so does the server."""
    body = complete(server, prompt(3), max_tokens=60, ignore_eos=True)
    expected = solo(eagle_engine, prompt(3), max_new_tokens=60, ignore_eos=True)
    details = body["usage"]["completion_tokens_details"]
    assert expected.accepted > 5
    assert details == {
        "accepted_prediction_tokens": expected.accepted,
        "rejected_prediction_tokens": expected.drafted - expected.accepted,
    }


@pytest.mark.parametrize("chat", [True, False])
def test_a_stream_is_the_answer_in_pieces(server: Served, chat: bool) -> None:
    fields: dict[str, Any] = {"max_tokens": 30, "temperature": 0, "return_token_ids": True}
    send = server.chat if chat else server.complete
    whole = send("Hello", **fields).json()
    options = {"include_usage": True}
    answer = send("Hello", stream=True, stream_options=options, **fields)
    assert answer.headers["content-type"].startswith("text/event-stream")
    *chunks, last = events(answer.text)
    assert last["choices"] == [] and last["usage"]["completion_tokens"] == 30
    assert last["usage"] | {"prompt_tokens_details": None} == whole["usage"] | {
        "prompt_tokens_details": None
    }
    choices = [choice for chunk in chunks for choice in chunk["choices"]]
    assert all(chunk["usage"] is None for chunk in chunks)
    texts = [c["delta"].get("content", "") if chat else c["text"] for c in choices]
    expected = whole["choices"][0]
    assert "".join(texts) == (expected["message"]["content"] if chat else expected["text"])
    assert [token for c in choices for token in c.get("token_ids", [])] == expected["token_ids"]
    reasons = [choice["finish_reason"] for choice in choices]
    assert reasons == [None] * (len(reasons) - 1) + [expected["finish_reason"]]
    assert len({chunk["id"] for chunk in chunks}) == 1
    if chat:
        assert choices[0]["delta"] == {"role": "assistant", "content": ""}


@pytest.mark.parametrize("seed", [0, 7, 2**64 - 1, -1])
def test_a_seed_makes_an_answer_repeat(server: Served, eagle_engine: Engine, seed: int) -> None:
    fields: dict[str, Any] = {"temperature": 1.3, "seed": seed, "max_tokens": 20}
    first, second = (complete(server, prompt(4), **fields)["choices"][0] for _ in range(2))
    assert first["token_ids"] == second["token_ids"]
    other = complete(server, prompt(4), **{**fields, "seed": 11})["choices"][0]
    assert other["token_ids"] != first["token_ids"]
    expected = solo(eagle_engine, prompt(4), temperature=1.3, seed=seed % 2**64, max_new_tokens=20)
    assert first["token_ids"] == expected.token_ids


def test_without_a_seed_answers_differ(server: Served) -> None:
    answers = {
        tuple(complete(server, prompt(4), temperature=2, max_tokens=20)["choices"][0]["token_ids"])
        for _ in range(3)
    }
    assert len(answers) == 3


def test_several_answers_have_seeds_in_a_row_and_share_pages(server: Served) -> None:
    tokens = prompt(5, 140)
    fields: dict[str, Any] = {"temperature": 1.3, "max_tokens": 12, "cache_salt": "several"}
    body = complete(server, tokens, n=3, seed=20, **fields)
    alone = [complete(server, tokens, seed=20 + at, **fields) for at in range(3)]
    assert [choice["index"] for choice in body["choices"]] == [0, 1, 2]
    expected = [answer["choices"][0]["token_ids"] for answer in alone]
    assert [choice["token_ids"] for choice in body["choices"]] == expected
    assert body["usage"]["prompt_tokens"] == 140
    assert body["usage"]["completion_tokens"] == sum(map(len, expected))
    assert [a["usage"]["prompt_tokens_details"]["cached_tokens"] for a in alone] == [128] * 3


def test_several_prompts_in_one_request(server: Served, eagle_engine: Engine) -> None:
    tokens = [prompt(6), prompt(7, 30)]
    body = server.complete(tokens, n=2, temperature=0, max_tokens=9, return_token_ids=True).json()
    expected = [solo(eagle_engine, each, max_new_tokens=9).token_ids for each in tokens]
    assert [choice["token_ids"] for choice in body["choices"]] == [
        expected[0],
        expected[0],
        expected[1],
        expected[1],
    ]
    assert body["usage"]["prompt_tokens"] == 42


def test_several_answers_in_a_stream(server: Served) -> None:
    fields: dict[str, Any] = {"n": 4, "temperature": 1.5, "seed": 3, "max_tokens": 10}
    whole = server.complete("abc", **fields).json()
    texts = [""] * 4
    for chunk in events(server.complete("abc", stream=True, **fields).text):
        for choice in chunk["choices"]:
            texts[choice["index"]] += choice["text"]
    assert texts == [choice["text"] for choice in whole["choices"]]


@pytest.mark.parametrize("stream", [False, True])
def test_stop_texts_are_exact(server: Served, eagle_engine: Engine, stream: bool) -> None:
    whole = solo(eagle_engine, prompt(8), max_new_tokens=60, ignore_eos=True).text
    checked = 0
    for start in range(2, len(whole) - 4, 5):
        for length in (1, 2, 4):
            stop = whole[start : start + length]
            answer = server.complete(
                prompt(8),
                stop=["\x00", stop],
                temperature=0,
                max_tokens=60,
                ignore_eos=True,
                stream=stream,
            )
            if stream:
                choices = [c for event in events(answer.text) for c in event["choices"]]
                text = "".join(choice["text"] for choice in choices)
            else:
                choices = answer.json()["choices"]
                text = choices[0]["text"]
            assert text == whole.partition(stop)[0], stop
            assert choices[-1]["finish_reason"] == "stop"
            checked += 1
    assert checked > 10


def test_penalties_bias_and_limits(server: Served, eagle_engine: Engine) -> None:
    first = solo(eagle_engine, prompt(9), max_new_tokens=30, ignore_eos=True)
    biased = {first.token_ids[0]: -100.0}
    expected = solo(eagle_engine, prompt(9), max_new_tokens=30, ignore_eos=True, logit_bias=biased)
    assert expected.token_ids[0] != first.token_ids[0]
    body = complete(
        server,
        prompt(9),
        max_tokens=30,
        ignore_eos=True,
        logit_bias={str(token): bias for token, bias in biased.items()},
    )
    assert body["choices"][0]["token_ids"] == expected.token_ids
    penalties = {"presence_penalty": 0.7, "frequency_penalty": 0.4, "repetition_penalty": 1.2}
    body = complete(server, prompt(9), max_tokens=30, ignore_eos=True, **penalties)
    expected = solo(eagle_engine, prompt(9), max_new_tokens=30, ignore_eos=True, **penalties)
    assert body["choices"][0]["token_ids"] == expected.token_ids != first.token_ids
    ends = [first.token_ids[4]]
    body = complete(server, prompt(9), max_tokens=30, min_tokens=12, stop_token_ids=ends)
    expected = solo(
        eagle_engine, prompt(9), max_new_tokens=30, min_new_tokens=12, stop_token_ids=ends
    )
    assert body["choices"][0]["token_ids"] == expected.token_ids
    assert len(expected.token_ids) >= 12
    cut = complete(server, prompt(9), max_tokens=30, stop_token_ids=ends)["choices"][0]
    assert cut["token_ids"][-1] == ends[0] and cut["finish_reason"] == "stop"
    low = {"temperature": 1.5, "min_p": 0.3, "top_p": 0.9, "top_k": 7, "seed": 5}
    body = complete(server, prompt(9), max_tokens=20, **low)
    expected = solo(eagle_engine, prompt(9), max_new_tokens=20, **low)
    assert body["choices"][0]["token_ids"] == expected.token_ids


def test_eos_ends_an_answer_unless_it_is_ignored(server: Served) -> None:
    """Also where the checkpoint's generation_config.json names it."""
    wants_to_end: dict[str, Any] = {"logit_bias": {"2": 100}, "max_tokens": 5}
    ended = complete(server, prompt(9), **wants_to_end)["choices"][0]
    assert (ended["token_ids"], ended["finish_reason"]) == ([2], "stop")
    ignored = complete(server, prompt(9), ignore_eos=True, **wants_to_end)["choices"][0]
    assert (ignored["token_ids"], ignored["finish_reason"]) == ([2] * 5, "length")


SCHEMA = {
    "type": "object",
    "properties": {"a": {"type": "integer", "maximum": 99, "minimum": 0}},
    "required": ["a"],
    "additionalProperties": False,
}


def test_schemas_and_patterns(server: Served, eagle_engine: Engine) -> None:
    of_format = {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA}}
    body = complete(server, prompt(10), max_tokens=80, response_format=of_format)
    grammar = Grammar(kind="json_schema", text=json.dumps(SCHEMA))
    expected = solo(eagle_engine, prompt(10), max_new_tokens=80, grammar=grammar)
    assert body["choices"][0]["token_ids"] == expected.token_ids
    assert 0 <= json.loads(body["choices"][0]["text"])["a"] <= 99
    pattern = "[a-c]{3}-[0-9]{2}"
    body = complete(server, prompt(10), structured_outputs={"regex": pattern}, temperature=1.5)
    assert re.fullmatch(pattern, body["choices"][0]["text"])
    json_object = complete(
        server,
        prompt(10),
        max_tokens=300,
        response_format={"type": "json_object"},
        logit_bias={str(token): 20 for token in (92, 95)},  # { and } of the tiny tokenizer
    )
    assert isinstance(json.loads(json_object["choices"][0]["text"]), dict)


def test_log_probabilities(server: Served, eagle_engine: Engine) -> None:
    """Those of the engine, which tests/test_logprobs.py holds against torch."""
    request = Request(
        token_ids=prompt(11), sampling=SamplingParams(temperature=0, max_new_tokens=20), logprobs=3
    )
    expected = eagle_engine.generate([request]).results[0]
    assert expected.logprobs is not None
    decode = eagle_engine.tokenizer.decode
    found = complete(server, prompt(11), max_tokens=20, logprobs=3)["choices"][0]["logprobs"]
    assert found["tokens"] == [decode([token]) for token in expected.token_ids]
    assert found["token_logprobs"] == pytest.approx(
        [one.logprob for one in expected.logprobs], abs=1e-4
    )
    for top, one, token in zip(
        found["top_logprobs"], expected.logprobs, expected.token_ids, strict=True
    ):
        # Keys are texts, and of the tiny tokenizer's tokens many are parts of characters.
        pairs = [*one.top.items(), (token, one.logprob)]
        named = {decode([token]): value for token, value in reversed(pairs)}
        assert top == pytest.approx(named, abs=1e-4)
    assert found["text_offset"][:2] == [0, len(found["tokens"][0])]


@pytest.mark.parametrize("top", [0, 2, 20])
@pytest.mark.parametrize("stream", [False, True])
def test_log_probabilities_of_a_conversation(server: Served, top: int, stream: bool) -> None:
    answer = server.chat(
        "Hello", max_tokens=12, temperature=0, logprobs=True, top_logprobs=top, stream=stream
    )
    if stream:
        choices = [c for event in events(answer.text) for c in event["choices"]]
        content = [entry for c in choices if c["logprobs"] for entry in c["logprobs"]["content"]]
    else:
        content = answer.json()["choices"][0]["logprobs"]["content"]
    assert len(content) == 12
    for entry in content:
        assert len(entry["top_logprobs"]) == top
        values = [one["logprob"] for one in entry["top_logprobs"]]
        assert values == sorted(values, reverse=True)
        if top:  # greedy
            assert entry["token"] == entry["top_logprobs"][0]["token"]
            assert entry["logprob"] == values[0]
        assert bytes(entry["bytes"]).decode("utf-8", "replace") == entry["token"]


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"prompt": [999_999]}, "token id 999999 is outside the model's vocabulary of 256"),
    ({"prompt": [10**30]}, "outside the model's vocabulary of 256"),
    ({"prompt": [-1]}, "token id -1 is outside"),
    ({"prompt": list(range(3, 250)) * 3}, "the prompt has 741 tokens, max_length is 512"),
    ({"prompt": [5], "stop_token_ids": [256]}, "stop_token_ids has token id 256"),
    ({"prompt": [5], "logit_bias": {"256": 1}}, "logit_bias has token id 256"),
    ({"prompt": [5], "structured_outputs": {"regex": "("}}, "cannot be used"),
    ({"prompt": [5], "structured_outputs": {"json": {"type": "nonsense"}}}, "cannot be used"),
    ({"prompt": [5], "structured_outputs": {"regex": "(?=a)b"}}, "cannot be used"),
]


@pytest.mark.parametrize(("fields", "said"), REFUSED)
@pytest.mark.parametrize("stream", [False, True])
def test_what_the_model_cannot_do_is_a_400(
    server: Served, fields: dict[str, Any], said: str, stream: bool
) -> None:
    answer = server.http.post("/v1/completions", json={**fields, "stream": stream})
    assert answer.status_code == 400, answer.text
    assert said in answer.json()["error"]["message"]
    assert server.complete([5], max_tokens=1).status_code == 200


def test_a_deep_schema_harms_nobody(server: Served) -> None:
    schema: dict[str, Any] = {"type": "integer"}
    for _ in range(300):
        schema = {"type": "array", "items": schema}
    answer = server.complete([5], structured_outputs={"json": schema}, max_tokens=4)
    assert answer.status_code in (200, 400)
    assert server.complete([5], max_tokens=1).status_code == 200


def test_another_model_is_not_here(server: Served) -> None:
    answer = server.chat("Hello", model="gpt-5")
    assert answer.status_code == 404
    assert "'gpt-5' is not served here; use 'tiny'" in answer.json()["error"]["message"]
    assert server.chat("Hello", model=MODEL_NAME, max_tokens=1).status_code == 200


def test_the_openai_client(server: Served) -> None:
    client = server.openai
    assert [model.id for model in client.models.list()] == [MODEL_NAME]
    assert client.models.retrieve(MODEL_NAME).id == MODEL_NAME
    messages: Any = [{"role": "user", "content": "Hello"}]
    made = client.chat.completions.create(
        model=MODEL_NAME, messages=messages, max_tokens=9, temperature=0, logprobs=True
    )
    text, usage = made.choices[0].message.content, made.usage
    assert text is not None and usage is not None and usage.completion_tokens == 9
    assert usage.completion_tokens_details is not None
    assert usage.completion_tokens_details.accepted_prediction_tokens is not None
    assert made.choices[0].logprobs is not None and made.choices[0].logprobs.content is not None
    stream = client.chat.completions.create(
        model=MODEL_NAME, messages=messages, max_tokens=9, temperature=0, stream=True
    )
    parts = [chunk.choices[0].delta.content or "" for chunk in stream]
    assert "".join(parts) == text
    completed = client.completions.create(model=MODEL_NAME, prompt="Hello", max_tokens=3, n=2)
    assert [choice.index for choice in completed.choices] == [0, 1]


KINDS: list[dict[str, Any]] = [
    {"temperature": 0},
    {"temperature": 1.2, "seed": 0},
    {"temperature": 0.8, "seed": 5, "top_k": 9, "top_p": 0.9},
    {"temperature": 1.5, "seed": 6, "min_p": 0.1, "repetition_penalty": 1.3, "logprobs": 2},
    {"temperature": 0, "presence_penalty": 1.5, "frequency_penalty": 0.5, "stream": True},
    {"temperature": 0, "logit_bias": {"70": -100, "71": 5}},
    {"temperature": 1.1, "seed": 8, "structured_outputs": {"regex": "[a-f]{4}(-[0-9]{2})*"}},
    {"temperature": 1.3, "seed": 9, "stop": ["a", "e", "\n"]},
    {"temperature": 1.4, "seed": 10, "n": 3},
    {"temperature": 0, "min_tokens": 12, "ignore_eos": True},
]


def test_two_hundred_requests_that_join_and_leave(
    server: Served,
    eagle_engine: Engine,
    tiny_target: Callable[[str], TargetReference],
) -> None:
    """Each is what it is alone, up to rounding; some clients leave in the middle."""

    def ask(number: int) -> list[list[int]] | None:
        tokens = prompt(number % 23, 3 + number * 7 % 150)
        fields = {**KINDS[number % len(KINDS)], "max_tokens": 12 + number % 30}
        if number % 8 == 7:
            leave(server, tokens, **fields)
            return None
        if fields.get("stream"):
            answer = server.complete(tokens, return_token_ids=True, **fields)
            choices = [choice for event in events(answer.text) for choice in event["choices"]]
            return [[token for choice in choices for token in choice["token_ids"]]]
        return [c["token_ids"] for c in complete(server, tokens, **fields)["choices"]]

    with ThreadPoolExecutor(16) as pool:
        found = list(pool.map(ask, range(200)))
    target, rounded = tiny_target(PRESET), 0
    for number, answers in enumerate(found):
        if answers is None:
            continue
        fields = KINDS[number % len(KINDS)]
        tokens = prompt(number % 23, 3 + number * 7 % 150)
        for at, (ours, theirs) in enumerate(zip(answers, alone(eagle_engine, number), strict=True)):
            if ours != theirs:
                assert is_rounding(target, tokens, ours, theirs, at, fields), (number, at, fields)
                rounded += 1
    # Of some 4,000 tokens that are drawn.
    assert rounded <= 3


def is_rounding(
    target: TargetReference,
    tokens: Sequence[int],
    ours: Sequence[int],
    theirs: Sequence[int],
    choice: int,
    fields: Mapping[str, Any],
) -> bool:
    """Whether two answers part where the last bits of float32 decide: at the border of two tokens.

    Args:
        choice: which of the answers to its prompt it is.
        fields: of the request, without a grammar.
    """
    pairs = enumerate(zip(ours, theirs, strict=False))
    at, drawn = next((at, sorted(pair)) for at, pair in pairs if pair[0] != pair[1])
    answer = list(ours[:at])
    logits = target.features_and_logits([*tokens, *answer])[1][-1].double().numpy()
    names = {"top_k", "top_p", "min_p", "temperature", "repetition_penalty"}
    law = {name: value for name, value in fields.items() if name in names}
    p = target_distribution(logits, prompt_ids=tokens, generated_ids=answer, **law)
    if not fields["temperature"]:
        low, high = (float(logits[token]) for token in drawn)
        return abs(low - high) < 1e-3
    seed = fields["seed"] + choice
    number = float(numbers(seed, [len(tokens) + at], Stream.TOKEN)[0])
    borders = np.cumsum(p)
    return all(abs(borders[token] - number) < 1e-5 for token in (drawn[0], drawn[1] - 1))


def alone(engine: Engine, number: int) -> list[list[int]]:
    """The engine's answers to one of the two hundred requests."""
    fields = {**KINDS[number % len(KINDS)], "max_new_tokens": 12 + number % 30}
    for name in ("logprobs", "stream"):
        fields.pop(name, None)
    count = fields.pop("n", 1)
    if "min_tokens" in fields:
        fields["min_new_tokens"] = fields.pop("min_tokens")
    if "logit_bias" in fields:
        fields["logit_bias"] = {int(token): bias for token, bias in fields["logit_bias"].items()}
    if "structured_outputs" in fields:
        pattern = fields.pop("structured_outputs")["regex"]
        fields["grammar"] = Grammar(kind="regex", text=pattern)
    tokens = prompt(number % 23, 3 + number * 7 % 150)
    seeds = [{"seed": fields["seed"] + at} if "seed" in fields else {} for at in range(count)]
    return [solo(engine, tokens, **{**fields, **seed}).token_ids for seed in seeds]


def leave(server: Served, tokens: Sequence[int], **fields: Any) -> None:
    """Reads one piece of a stream, and goes."""
    body = {**fields, "prompt": list(tokens), "stream": True}
    with server.http.stream("POST", "/v1/completions", json=body) as answer:
        next(answer.iter_lines())


@pytest.mark.parametrize("stream", [False, True])
def test_who_leaves_is_taken_out(server: Served, stream: bool) -> None:
    """Long answers without a reader do not hold up others."""
    fields: dict[str, Any] = {"max_tokens": 490, "ignore_eos": True, "n": 8}
    for _ in range(5):
        if stream:
            leave(server, prompt(1), **fields)
            continue
        with pytest.raises(httpx.ReadTimeout):
            server.http.post("/v1/completions", json={"prompt": prompt(1), **fields}, timeout=0.5)
    assert server.complete(prompt(2), max_tokens=2).status_code == 200
    # Eighty answers of 490 tokens would take far longer.
    deadline = time.monotonic() + 10
    while "maxserve_num_requests_running 0.0" not in server.http.get("/metrics").text:
        assert time.monotonic() < deadline
        time.sleep(0.1)


BODIES = st.fixed_dictionaries(
    {},
    optional={
        "prompt": st.text(min_size=1, max_size=40) | st.lists(st.integers(-2, 260), max_size=30),
        "max_tokens": st.integers(0, 30),
        "temperature": st.floats(0, 2.1),
        "top_k": st.integers(-2, 300),
        "top_p": st.floats(-0.1, 1),
        "min_p": st.floats(0, 1),
        "repetition_penalty": st.floats(0, 3),
        "seed": st.integers(-(2**63), 2**64),
        "n": st.integers(0, 9),
        "logprobs": st.integers(-1, 21),
        "stop": st.text(max_size=3) | st.lists(st.text(max_size=3), max_size=3),
        "logit_bias": st.dictionaries(st.integers(-1, 257).map(str), st.floats(-101, 101)),
        "min_tokens": st.integers(-1, 31),
        "stop_token_ids": st.lists(st.integers(-1, 257), max_size=3),
        "structured_outputs": st.fixed_dictionaries(
            {"regex": st.text("ab(|)*+?[]{}1,.", max_size=9)}
        ),
        "stream": st.booleans(),
        "ignore_eos": st.booleans(),
    },
)


@settings(max_examples=200, deadline=None, suppress_health_check=list(HealthCheck))
@given(BODIES)
def test_no_request_harms_the_model(server: Served, body: dict[str, Any]) -> None:
    """With the whole server: none is a 5xx, none ends it."""
    raw = json.dumps({"prompt": "ab", **body}).encode()
    answer = server.http.post("/v1/completions", content=raw)
    assert answer.status_code in (200, 400), answer.text
    if answer.status_code == 200 and body.get("stream"):
        events(answer.text)
    assert server.process.poll() is None
