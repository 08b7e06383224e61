"""Prompts that the target of a training writes itself."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from reference.target import TargetReference
from safetensors.torch import load_file
from tiny import TinyPair

from unispec.chat import encode_message
from unispec.errors import InputError
from unispec.training import Collection, CollectSettings, TorchTarget, collect
from unispec.training.own_prompts import write_prompts

SETTINGS: dict[str, Any] = {"max_new_tokens": 12, "own_prompts": True}
GIVEN = [f"{a}{b}" for a in "abcdefgh" for b in "stuvwx"]

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def target(tiny_pair: Callable[[str], TinyPair]) -> TorchTarget:
    target = TorchTarget(str(tiny_pair("D").target))
    target.tokenizer.chat_template = "<{{ messages[0]['content'] }}>"
    return target


def test_the_best_message_is_what_the_model_would_write_there(
    demo_model: Path, demo_target: TargetReference, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The beginning is spelt out here; the reference goes on from it."""
    target = TorchTarget(str(demo_model))
    begun = (
        "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face"
        "<|im_end|>\n<|im_start|>user\n"
    )
    ids = target.tokenizer.encode(begun, add_special_tokens=False)
    written = demo_target.greedy(ids, 64, target.eos).token_ids
    monkeypatch.setattr("unispec.training.own_prompts.TEMPERATURE", 0.0)
    expected = target.tokenizer.decode(written).split("<|im_end|>")[0]
    assert write_prompts(target, 2, seed=0) == [expected]


def test_messages_differ_end_and_have_no_marks(
    demo_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("unispec.training.own_prompts.LONGEST", 30)
    target = TorchTarget(str(demo_model))
    texts = write_prompts(target, 6, seed=1)
    assert 2 <= len(texts) == len(set(texts)) <= 6
    for text in texts:
        assert text == text.strip()
        assert "<|" not in text
        assert len(target.tokenizer.encode(text)) < 30
    assert write_prompts(target, 6, seed=1) == texts
    assert not set(write_prompts(target, 6, seed=2)) & set(texts)


def test_half_of_a_collection(
    target: TorchTarget, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The others are those given; one that comes again is held out again or learnt from again."""
    own = [f"{number} plus {number}" for number in range(30)]

    def write(target: TorchTarget, count: int, seed: int) -> list[str]:
        assert count == 32
        return own[seed % 2 :]

    monkeypatch.setattr("unispec.training.collecting.write_prompts", write)
    collection = collect(target, GIVEN, CollectSettings(tokens=1300, **SETTINGS), tmp_path)
    assert collection.num_shards >= 2

    def prompts(places: list[Any]) -> list[tuple[int, ...]]:
        read = map(collection.read, places)
        return [tuple(one.tokens[: one.prompt_length].tolist()) for one in read]

    held_out, learnt = prompts(collection.held_out), prompts(collection.training)
    posed = {tuple(encode_message(target.tokenizer, text)) for text in own}
    assert len([one for one in held_out + learnt if one not in posed]) == 32 * collection.num_shards
    assert not set(held_out) & set(learnt)
    assert posed <= set(held_out) | set(learnt)
    assert 1 <= len(posed & set(held_out)) <= 9


def test_a_killed_collection_goes_on_with_the_same_messages(
    target: TorchTarget, tmp_path: Path
) -> None:
    target.eos = list(range(3, 256, 8))  # so that many of its messages end
    settings = CollectSettings(tokens=500, **SETTINGS)

    def kill(collection: Collection) -> None:
        if collection.num_shards == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        collect(target, GIVEN, settings, tmp_path / "killed", on_shard=kill)
    resumed = collect(target, GIVEN, settings, tmp_path / "killed")
    whole = collect(target, GIVEN, settings, tmp_path / "whole")
    assert resumed.num_shards == whole.num_shards >= 2
    assert len(whole.training) + len(whole.held_out) > 40 * whole.num_shards
    for number in range(whole.num_shards):
        name = f"shard-{number:05d}.safetensors"
        ours, theirs = (load_file(tmp_path / run / name) for run in ("killed", "whole"))
        assert all(ours[key].equal(theirs[key]) for key in theirs)


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (None, "has no chat template, so it cannot write prompts: use --no-own-prompts"),
        ("{{ raise_exception('no') }}", r"refuses a message \(no\); use --no-own-prompts"),
        ("<{{ messages[0]['content'] | upper }}>", "does not put a message between marks"),
        ("{{ messages[0]['content'] }}>", "does not put a message between marks"),
        ("<{{ messages[0]['content'] }}", "does not put a message between marks"),
    ],
    ids=["none", "refuses", "changes", "no-beginning", "no-end"],
)
def test_templates_in_which_no_message_can_be_begun(
    target: TorchTarget, template: str | None, message: str
) -> None:
    target.tokenizer.chat_template = template
    with pytest.raises(InputError, match=message):
        write_prompts(target, 2, seed=0)
