"""Which requests belong together, as a router sees it."""

from __future__ import annotations

import json

import pytest

from unispec.deployment.affinity import Affinity, affinity_of


def of(headers: dict[str, str] | None = None, **body: object) -> Affinity:
    return affinity_of(headers or {}, json.dumps(body).encode())


def turns(*contents: str) -> list[dict[str, str]]:
    roles = ("user", "assistant")
    return [{"role": roles[at % 2], "content": text} for at, text in enumerate(contents)]


def test_the_next_turn_of_a_conversation_begins_with_the_keys_of_the_one_before() -> None:
    first = of(messages=turns("a" * 700))
    second = of(messages=turns("a" * 700, "an answer", "b" * 300))
    assert len(first.blocks) == 2
    assert second.blocks[:2] == first.blocks
    assert len(second.blocks) > 2


def test_prompts_share_as_many_keys_as_they_share_blocks_of_256_characters() -> None:
    # One character of JSON before the text.
    one, other = of(prompt="x" * 600 + "1" * 400), of(prompt="x" * 600 + "2" * 400)
    equal = [left == right for left, right in zip(one.blocks, other.blocks, strict=True)]
    assert equal == [True, True, False]


def test_a_key_says_all_that_comes_before_it() -> None:
    tail = "t" * 512
    one, other = of(prompt="1" * 512 + tail), of(prompt="2" * 512 + tail)
    assert not set(one.blocks) & set(other.blocks)


def test_a_short_prompt_has_one_key_and_token_ids_have_keys_too() -> None:
    assert len(of(prompt="hi").blocks) == 1
    assert of(prompt="hi") != of(prompt="ho")
    assert of(prompt=[5] * 600).blocks[:2] == of(prompt=[5] * 600 + [6]).blocks[:2]


def test_prompts_with_other_salts_share_nothing() -> None:
    prompt = "x" * 600
    assert not set(of(prompt=prompt).blocks) & set(of(prompt=prompt, cache_salt="a").blocks)


def test_a_long_prompt_has_128_keys() -> None:
    assert len(of(prompt="x" * 100_000).blocks) == 128


def test_the_session_is_a_header_or_the_bodys_cache_key() -> None:
    named = of({"x-session-id": "s"}, prompt="1")
    assert named.session is not None
    assert named.session == of({"x-session-id": "s"}, prompt="2").session
    assert named.session == of(prompt="3", prompt_cache_key="s").session
    assert named.session != of({"x-session-id": "t"}, prompt="1").session
    assert named.keys == (*named.blocks, named.session)
    assert named.home == named.session
    assert of(prompt="1").home == of(prompt="1").blocks[0]


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b'{"prompt": ""}',
        b'{"messages": 5}',
        b"\xff",
        b'{"prompt": ' + b"[" * 100_000,
    ],
    ids=lambda body: repr(body[:20]),
)
def test_what_is_no_request_is_for_the_server_to_refuse(body: bytes) -> None:
    assert affinity_of({}, body).session is None


def test_text_that_is_no_unicode_has_keys() -> None:
    assert affinity_of({}, b'{"prompt": "\\ud800", "prompt_cache_key": "\\ud800"}').session
