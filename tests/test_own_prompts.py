"""Prompts that the target of a training writes itself."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from reference.target import TargetReference
from safetensors.torch import load_file
from tiny import TinyPair

from unispec.chat import encode_message
from unispec.cli import unispec
from unispec.errors import InputError
from unispec.training import Collection, CollectSettings, TorchTarget, collect
from unispec.training.collecting import num_own_prompts
from unispec.training.own_prompts import MessageDelimiters, message_delimiters, write_prompts
from unispec.training.seeds import seed_of

SETTINGS: dict[str, Any] = {"max_new_tokens": 12, "own_prompts": True}
GIVEN = [f"{a}{b}" for a in "abcdefgh" for b in "stuvwx"]

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def target(tiny_pair: Callable[[str], TinyPair]) -> TorchTarget:
    target = TorchTarget(str(tiny_pair("llama_eagle_agreeing").target))
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
    assert write_prompts(target, message_delimiters(target), 2, seed=0) == [expected]


def test_messages_differ_end_and_have_no_delimiters(
    demo_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("unispec.training.own_prompts.LONGEST", 30)
    target = TorchTarget(str(demo_model))
    delimiters = message_delimiters(target)
    texts = write_prompts(target, delimiters, 6, seed=1)
    assert 2 <= len(texts) == len(set(texts)) <= 6
    for text in texts:
        assert text == text.strip()
        assert "<|" not in text
        assert len(target.tokenizer.encode(text)) < 30
    assert write_prompts(target, delimiters, 6, seed=1) == texts
    assert not set(write_prompts(target, delimiters, 6, seed=2)) & set(texts)


def test_half_of_a_collection(
    target: TorchTarget,
    tiny_target: Callable[[str], TargetReference],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The others are those given. Of its own each is posed once, a tenth of them to measure."""
    own = [f"{number} plus {number}" for number in range(40)]

    def write(
        target: TorchTarget, delimiters: MessageDelimiters, count: int, seed: int
    ) -> list[str]:
        assert count == 32
        return [GIVEN[0], GIVEN[1], *own[: 20 + written.pop()]]

    written = [0] * 9 + [20, 15, 0]
    monkeypatch.setattr("unispec.training.collecting.write_prompts", write)
    collection = collect(target, GIVEN, CollectSettings(tokens=1300, **SETTINGS), tmp_path)
    assert collection.num_shards >= 3

    def prompts(places: list[Any]) -> list[tuple[int, ...]]:
        read = map(collection.read, places)
        return [tuple(one.tokens[: one.prompt_length].tolist()) for one in read]

    held_out, learnt = prompts(collection.held_out), prompts(collection.training)
    assert not set(held_out) & set(learnt)
    texts = list(collection.prompts())
    assert sorted(tuple(encode_message(target.tokenizer, text)) for text in texts) == sorted(
        held_out + learnt
    )
    posed = [tuple(encode_message(target.tokenizer, text)) for text in own]
    assert num_own_prompts(collection, GIVEN) == len(own)
    assert [one for one in held_out if one in posed] == posed[::10]
    assert sorted(one for one in learnt if one in posed) == sorted({*posed} - {*posed[::10]})
    given = [one for one in held_out + learnt if one not in posed]
    assert len(given) == 32 * collection.num_shards
    reference = tiny_target("llama_eagle_agreeing")
    for place in collection.held_out:
        found = collection.read(place)
        ids, begin = found.tokens.tolist(), place.prompt_length
        assert ids[begin:] == reference.greedy(ids[:begin], 12, target.eos).token_ids


def test_a_template_that_tells_the_time(
    target: TorchTarget, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A prompt's tokens are others each time; what is asked again is known by its text."""
    target.tokenizer.chat_template = "{{ strftime_now('%f') }}<{{ messages[0]['content'] }}>"
    own = [f"{number} plus {number}" for number in range(20)]
    monkeypatch.setattr("unispec.training.collecting.write_prompts", lambda *_: own)
    for tokens in (400, 900):
        settings = CollectSettings(tokens=tokens, **SETTINGS)
        collection = collect(target, GIVEN, settings, tmp_path)
    assert collection.num_shards >= 2
    assert [text for text in collection.prompts() if text in own] == own
    assert num_own_prompts(collection, GIVEN) == len(own)


def test_prompts_and_answers_are_drawn_apart(
    target: TorchTarget, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """torch's generator takes the lowest 32 bits of a seed and no more."""
    seeds: list[int] = []
    write = TorchTarget.write

    def spy(*arguments: Any) -> Any:
        seeds.append(arguments[5])
        return write(*arguments)

    monkeypatch.setattr(TorchTarget, "write", spy)
    collect(target, GIVEN, CollectSettings(tokens=700, **SETTINGS), tmp_path)
    assert len(seeds) >= 4
    assert len({seed % 2**32 for seed in seeds}) == len(seeds)
    assert seed_of("prompts", 0, 1) == seed_of("prompts", 0, 1) < 2**32


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
    ("template", "before", "after"),
    [
        ("<{{ messages[0]['content'] }}>", "<", ">"),
        ("[INST] {{ messages[0]['content'] }} [/INST]", "[INST]", "[/INST]"),
        (
            "USER: {{ messages[0]['content'] }}{{ ' AI: ' if add_generation_prompt }}",
            "USER:",
            "AI:",
        ),
    ],
    ids=["one character", "Llama 2", "the answer's beginning"],
)
def test_a_message_ends_where_the_template_goes_on(
    target: TorchTarget, monkeypatch: pytest.MonkeyPatch, template: str, before: str, after: str
) -> None:
    """Or where the target ends it; one that does not end or has delimiters in it is left out."""
    tokenizer = target.tokenizer
    tokenizer.chat_template = template
    delimiters = message_delimiters(target)
    assert tokenizer.decode(delimiters.before) == before
    assert (delimiters.after, delimiters.ends) == (after, frozenset())
    eos = target.eos[0]
    texts = [f" a question{after} an answer", " it goes on", f"{after} an answer"]
    written = [tokenizer.encode(text, add_special_tokens=False) for text in texts]
    special = tokenizer.all_special_ids[0]
    written += [[*written[1], eos], [*written[1], special, *written[0]], [eos]]
    monkeypatch.setattr(target, "write", lambda *_: written)
    assert write_prompts(target, delimiters, len(written), seed=0) == ["a question", "it goes on"]


def test_a_message_with_a_control_token_is_left_out(
    demo_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also with one that the tokenizer has no name for."""
    target = TorchTarget(str(demo_model))
    tokenizer, end = target.tokenizer, target.tokenizer.convert_tokens_to_ids("<|im_end|>")
    controls = [tokenizer.convert_tokens_to_ids(text) for text in ("<|endoftext|>", "<repo_name>")]
    assert not {*controls} & {*tokenizer.all_special_ids}
    word = tokenizer.encode("Hello")
    written = [[*word, control, *word, end] for control in controls]
    monkeypatch.setattr(target, "write", lambda *_: [*written, [*word, end]])
    assert write_prompts(target, message_delimiters(target), 3, seed=0) == ["Hello"]


def test_the_token_that_ends_a_message(demo_model: Path) -> None:
    target = TorchTarget(str(demo_model))
    assert message_delimiters(target).ends == {target.tokenizer.convert_tokens_to_ids("<|im_end|>")}
    # As of DeepSeek's distilled Llamas: only the answer's beginning is behind a message.
    target.tokenizer.chat_template = (
        "<|im_start|>{{ messages[0]['content'] }}"
        "{% if add_generation_prompt %}{{ '<|endoftext|>' }}{% endif %}"
    )
    delimiters = message_delimiters(target)
    assert delimiters.ends == {target.tokenizer.convert_tokens_to_ids("<|endoftext|>")}


@pytest.mark.parametrize(
    "template",
    [
        None,
        "{{ raise_exception('no') }}",
        "<{{ messages[0]['content'] | upper }}>",
        "{{ messages[0]['content'] }}>",
        "<{{ messages[0]['content'] }}",
    ],
    ids=["none", "refuses", "changes", "no-beginning", "no-end"],
)
def test_templates_in_which_no_message_can_be_begun(
    target: TorchTarget, tmp_path: Path, template: str | None
) -> None:
    """Nothing is made before that is known."""
    target.tokenizer.chat_template = template
    with pytest.raises(InputError, match=r"cannot write prompts.*: use own_prompts=False") as error:
        message_delimiters(target)
    assert ("(no)" in str(error.value)) == (template == "{{ raise_exception('no') }}")
    if template and "raise" not in template:
        with pytest.raises(InputError, match=r"cannot write prompts"):
            collect(target, GIVEN, CollectSettings(tokens=1, **SETTINGS), tmp_path / "data")
    assert not (tmp_path / "data").exists()


def test_own_prompts_need_the_chat_template() -> None:
    with pytest.raises(InputError, match="own prompts need the chat template"):
        CollectSettings(own_prompts=True, chat_template=False)


def test_the_command_asks_for_own_prompts_where_it_can(
    tiny_pair: Callable[[str], TinyPair], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Without --prompts; with --own-prompts it says why it cannot, and leaves nothing behind."""
    model = tmp_path / "model"
    shutil.copytree(tiny_pair("llama_eagle_agreeing").target, model)
    eos = list(range(3, 256, 8))  # so that many of its messages end
    config = json.loads((model / "config.json").read_text()) | {"eos_token_id": eos}
    (model / "config.json").write_text(json.dumps(config))
    (model / "generation_config.json").unlink(missing_ok=True)
    template = model / "chat_template.jinja"
    given: list[Any] = ["train", "--model", model, "--speculative-method", "eagle", "--output"]
    options = ["--tokens", 500, "--max-new-tokens", 12, "--epochs", 1]

    def run(output: str, *more: Any) -> Result:
        arguments = [*given, tmp_path / output, *options, *more]
        return CliRunner().invoke(unispec, [*map(str, arguments)])

    template.write_text("<{{ messages[0]['content'] }}>")
    done = run("own")
    assert done.exit_code == 0, done.output
    settings = json.loads((tmp_path / "own" / "training.json").read_text())["settings"]
    assert 10 < settings["own prompts"] < settings["sequences"] + settings["held-out sequences"]
    assert settings["prompts"] == "the built-in ones"

    template.unlink()
    refused = run("no template")
    assert refused.exit_code == 2
    assert "--no-chat-template" in " ".join(refused.stderr.split())
    assert "built-in prompts" not in caplog.text
    assert not (tmp_path / "no template").exists()

    template.write_text("<{{ messages[0]['content'] }}")
    refused = run("refused", "--own-prompts")
    assert refused.exit_code == 2
    assert "its chat template has no delimiter before and behind" in " ".join(
        refused.stderr.split()
    )
    assert not (tmp_path / "refused").exists()
    for output, more in (("fallen back", []), ("without", ["--no-own-prompts"])):
        caplog.clear()
        done = run(output, *more)
        assert done.exit_code == 0, done.output
        assert ("Only the built-in prompts" in caplog.text) == (not more)
        settings = json.loads((tmp_path / output / "training.json").read_text())["settings"]
        assert settings["own prompts"] == 0
