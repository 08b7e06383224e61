"""Whatever is wrong with a request is said before it leaves the API process."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from max.pipelines.context import SamplingParams, TextContext, TextGenerationResponseFormat
from max.pipelines.context.exceptions import InputError as RequestError
from max.pipelines.modeling.types import (
    ImageContentPart,
    TextGenerationRequest,
    TextGenerationRequestMessage,
    VideoContentPart,
)
from scheduling import request
from tiny import TinyPair

from unispec.engine import EngineConfig
from unispec.engine.served_config import served_pipeline
from unispec.pipelines.served.context import ServedContext
from unispec.pipelines.served.tokenizer import ServedTokenizer

GREEDY = SamplingParams(temperature=0, max_new_tokens=20)
TEMPLATE = "{% for turn in messages %}{{ turn.content }}{% endfor %}:"


@pytest.fixture(scope="module")
def tokenizer(tiny_pair: Callable[[str], TinyPair]) -> ServedTokenizer:
    """Of a target whose cache holds two pages."""
    pair = tiny_pair("llama_eagle_agreeing")
    return served_pipeline(
        EngineConfig(
            model=str(pair.target),
            draft_model=str(pair.draft),
            speculative_method="eagle",
            kv_cache_pages=2,
            max_length=300,
        )
    ).tokenizer


@pytest.fixture(scope="module")
def kimi(tiny_pair: Callable[[str], TinyPair]) -> ServedTokenizer:
    return served_pipeline(
        EngineConfig(model=str(tiny_pair("kimi_dflash").target), max_length=256)
    ).tokenizer


def context(tokenizer: ServedTokenizer, asked: TextGenerationRequest) -> TextContext:
    return asyncio.run(tokenizer.new_context(asked))


def refusal(tokenizer: ServedTokenizer, asked: TextGenerationRequest) -> str:
    with pytest.raises(RequestError) as refused:
        context(tokenizer, asked)
    return str(refused.value)


@pytest.mark.parametrize(
    ("prompt", "text"),
    [
        ([], "the prompt is empty"),
        ([5, 256], "token id 256 is outside the model's vocabulary of 256"),
        ([-1], "token id -1 is outside"),
        ([10**30], "is outside the model's vocabulary"),
        ([5, "a"], "has 'a' among its token ids"),
        ([5] * 300, "has 300 tokens, max_length is 300"),
        ([5] * 240, "may be 260 tokens long and the cache holds 239"),
    ],
    ids=str,
)
def test_prompts(tokenizer: ServedTokenizer, prompt: list[Any], text: str) -> None:
    assert text in refusal(tokenizer, request(prompt, GREEDY))


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"temperature": float("nan")}, "temperature is nan"),
        ({"top_p": 1.5}, "top_p is 1.5"),
        ({"stop_token_ids": [400]}, "token id 400 is outside"),
        ({"min_new_tokens": 280, "max_new_tokens": 290}, "min_new_tokens is 280"),
        ({"stop": [""]}, "stop has an empty text"),
        ({"logits_processors": [print]}, "logits_processors of the SamplingParams"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_sampling_parameters(
    tokenizer: ServedTokenizer, changes: dict[str, Any], text: str
) -> None:
    params = replace(GREEDY)
    for name, value in changes.items():
        object.__setattr__(params, name, value)
    assert text in refusal(tokenizer, request([5] * 30, params))


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({"tools": [{"type": "function"}]}, "has 1 tools"),
        ({"echo": True}, "echo is not supported"),
        ({"logprobs": 21}, "logprobs is 21"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_what_the_models_cannot_do(
    tokenizer: ServedTokenizer, fields: dict[str, Any], text: str
) -> None:
    assert text in refusal(tokenizer, request([5], GREEDY, **fields))


@pytest.mark.parametrize("name", ["images", "videos"])
def test_what_is_seen_is_refused(tokenizer: ServedTokenizer, name: str) -> None:
    part = {"images": ImageContentPart, "videos": VideoContentPart}[name]()
    turn = TextGenerationRequestMessage(role="user", content=[part])
    asked = replace(request([5], GREEDY), prompt=None, messages=[turn], **{name: [b"x"]})
    assert f"has 1 {name}, and this server reads text only" in refusal(tokenizer, asked)


def test_integers_fit_into_a_message(tokenizer: ServedTokenizer) -> None:
    """An engine takes seeds modulo 2**64, too."""
    params = SamplingParams(max_new_tokens=10**30)
    object.__setattr__(params, "seed", 2**70 + 5)
    with pytest.raises(RequestError, match="the cache holds"):
        context(tokenizer, request([5], params))
    made = context(tokenizer, request([5], replace(GREEDY, seed=-1)))
    assert made.sampling_params.seed == 2**64 - 1
    tokenizer.longest_in_cache, kept = None, tokenizer.longest_in_cache
    made = context(tokenizer, request([5], params))
    tokenizer.longest_in_cache = kept
    assert (made.sampling_params.seed, made.sampling_params.max_new_tokens) == (5, 300)


def test_a_placeholder_of_an_image_in_a_text_is_refused(kimi: ServedTokenizer) -> None:
    placeholder = kimi._hf.media_placeholder_token_id
    text = refusal(kimi, request([5, placeholder, 6], GREEDY))
    assert "1 image placeholders" in text


def test_a_context_has_all_that_was_asked(tokenizer: ServedTokenizer) -> None:
    schema = {"type": "integer"}
    asked = request(
        "hello",
        replace(GREEDY, stop=["end"], stop_token_ids=[9]),
        response_format=TextGenerationResponseFormat(type="json_schema", json_schema=schema),
        cache_salt="a",
        logprobs=2,
    )
    made = context(tokenizer, asked)
    assert type(made) is ServedContext
    assert made.request_id == asked.request_id
    assert json.loads(str(made.json_schema)) == schema
    assert (made.cache_salt, made.log_probabilities, made.model_name) == ("a", 2, "m")
    assert made.eos_tracker.eos_token_ids == {9} | tokenizer.eos_token_ids
    assert made.eos_tracker.eos_stop_strings == ["end"]
    assert made.max_length == len(made.tokens) + 20
    assert made.vocab_size == 256


def test_a_conversation_is_written_by_the_template(tokenizer: ServedTokenizer) -> None:
    asked = replace(
        request([5], GREEDY),
        prompt=None,
        messages=[TextGenerationRequestMessage(role="user", content="hello")],
    )
    assert "no chat template" in refusal(tokenizer, asked)
    tokenizer.delegate.chat_template = TEMPLATE
    made = context(tokenizer, asked)
    expected = tokenizer.delegate.encode("hello:", add_special_tokens=False)
    assert made.tokens.all.tolist() == expected
    tokenizer.delegate.chat_template = "{{ raise_exception('no') }}"
    assert "the chat template refuses the messages" in refusal(tokenizer, asked)
    tokenizer.delegate.chat_template = None


def test_half_a_character_is_replaced(tokenizer: ServedTokenizer) -> None:
    made = context(tokenizer, request("a\ud800b", GREEDY))
    assert made.tokens.all.tolist() == tokenizer.delegate.encode("a\ufffdb")
