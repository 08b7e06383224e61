"""How prompts and images reach the engine, from options and from standard input."""

from __future__ import annotations

import io
import json
import os
import sys
from pathlib import Path

import click
import pytest
from fake_engine import CHAT_TEMPLATE, FakeEngine, assert_refused, run
from PIL import Image

from unispec.cli import unispec
from unispec.commands.prompts import PromptOptions

SEEING_TEMPLATE = (
    "{% for part in messages[0].content %}"
    "{% if part.type == 'image' %}<image> {% else %}{{ part.text }} {% endif %}{% endfor %}<bot>"
)


def save_image(file: Path) -> Path:
    """Saves a picture in the format of the file's suffix."""
    Image.new("RGB", (20, 10), "red").save(file)
    return file


@pytest.mark.parametrize(
    ("chat_template", "flags", "token_ids"),
    [
        (CHAT_TEMPLATE, [], [2, 4, 5, 3]),
        (CHAT_TEMPLATE, ["--no-chat-template"], [1, 4, 5]),
        (None, [], [1, 4, 5]),
    ],
)
def test_prompt_is_encoded_as_the_tokenizer_wants(
    engine: type[FakeEngine],
    model: Path,
    chat_template: str | None,
    flags: list[str],
    token_ids: list[int],
) -> None:
    engine.chat_template = chat_template
    assert run("--model", model, "--prompt", "hello world", *flags).exit_code == 0
    assert list(engine.made[0].requests[0].token_ids) == token_ids


@pytest.mark.parametrize(
    ("chat_template", "text", "token_ids"),
    [(SEEING_TEMPLATE, "hello", [6, 6, 4, 3]), (None, "hello <image> <image>", [1, 4, 6, 6])],
)
def test_images_reach_the_request_in_order(
    engine: type[FakeEngine],
    model: Path,
    tmp_path: Path,
    chat_template: str | None,
    text: str,
    token_ids: list[int],
) -> None:
    """The chat template writes their placeholders; without one the prompt has them itself."""
    engine.chat_template, engine.reads_images = chat_template, True
    files = [save_image(tmp_path / name) for name in ("b.png", "a.webp")]
    flags = ["--image", str(files[0]), "--image", str(files[1])]
    result = run("--model", model, "--prompt", text, "--json", *flags)
    (request,) = engine.made[0].requests
    assert list(request.token_ids) == token_ids
    assert list(request.images) == files
    assert json.loads(result.stdout)["results"][0]["prompt"] == text


def test_a_text_prompt_stays_text_for_a_model_that_reads_images(
    engine: type[FakeEngine], model: Path
) -> None:
    engine.reads_images = True
    assert run("--model", model, "--prompt", "hello world").exit_code == 0
    (request,) = engine.made[0].requests
    assert list(request.token_ids) == [2, 4, 5, 3]
    assert list(request.images) == []


def test_an_image_for_a_model_that_reads_none_is_refused(
    engine: type[FakeEngine], model: Path, tmp_path: Path
) -> None:
    """By its own error, whatever its chat template makes of content in parts."""
    engine.chat_template = "{{ raise_exception('content is no text') }}"
    file = save_image(tmp_path / "cat.png")
    result = run("--model", model, "--prompt", "hello", "--image", file)
    assert_refused(result, "--image", str(model), "reads no images")


def test_an_image_that_cannot_be_used_is_refused_before_anything_is_loaded(
    engine: type[FakeEngine], model: Path, tmp_path: Path
) -> None:
    file = save_image(tmp_path / "cat.gif").rename(tmp_path / "cat.png")
    result = run("--model", model, "--prompt", "hello", "--image", file)
    assert_refused(result, str(file), "PNG, JPEG or WebP")
    assert engine.made == []


def test_what_is_piped_in_is_one_prompt(engine: type[FakeEngine], model: Path) -> None:
    for piped, prompt in [
        ("hello\nworld\n", "hello\nworld"),
        ("hello\n\n", "hello\n"),
        ("hello", "hello"),
        ("\ufeffhello\r\nwörld\r\n", "hello\nwörld"),
    ]:
        result = run("--model", model, "--json", stdin=piped.encode())
        assert [entry["prompt"] for entry in json.loads(result.stdout)["results"]] == [prompt]


def test_a_prompt_that_is_given_leaves_standard_input_alone(
    engine: type[FakeEngine], model: Path
) -> None:
    result = run("--model", model, "--prompt", "hello", "--json", stdin="world\n")
    assert [entry["prompt"] for entry in json.loads(result.stdout)["results"]] == ["hello"]


def test_an_image_may_belong_to_a_piped_prompt(
    engine: type[FakeEngine], model: Path, tmp_path: Path
) -> None:
    engine.chat_template, engine.reads_images = SEEING_TEMPLATE, True
    file = save_image(tmp_path / "cat.jpg")
    assert run("--model", model, "--image", file, stdin="hello\n").exit_code == 0
    (request,) = engine.made[0].requests
    assert (list(request.token_ids), list(request.images)) == ([6, 4, 3], [file])


def test_a_dash_as_prompt_file_is_one_prompt_a_line(engine: type[FakeEngine], model: Path) -> None:
    result = run("--model", model, "--prompt-file", "-", "--json", stdin="hello\nworld\n")
    prompts = [entry["prompt"] for entry in json.loads(result.stdout)["results"]]
    assert prompts == ["hello", "world"]


def test_a_dash_as_schema_is_standard_input(engine: type[FakeEngine], model: Path) -> None:
    schema = ["--model", model, "--json-schema", "-"]
    assert run(*schema, "--prompt", "hello", stdin='{"type": "object"}').exit_code == 0
    (request,) = engine.made[0].requests
    assert request.grammar is not None
    assert request.grammar.text == '{"type": "object"}'
    # It is no prompt, too.
    assert_refused(run(*schema, stdin='{"type": "object"}'), "no prompt", "--prompt")
    twice = run(*schema, "--prompt-file", "-", stdin='{"type": "object"}')
    assert_refused(twice, "standard input", "two options")


def test_standard_input_that_cannot_be_used_is_one_line(engine: type[FakeEngine]) -> None:
    for piped, flags, words in [
        (b"", [], ["no prompt", "--prompt", "--prompt-file", "pipe"]),
        (b"\n", [], ["no prompt"]),
        (b"hello \xff", [], ["standard input", "UTF-8", "byte 6"]),
        (b"hello \xff", ["--prompt-file", "-"], ["--prompt-file", "standard input", "UTF-8"]),
        (b"", ["--prompt-file", "-"], ["--prompt-file", "standard input", "no prompt"]),
        (b"a\n\nb", ["--prompt-file", "-"], ["standard input", "line 2"]),
        (b"[]", ["--json-schema", "-"], ["--json-schema", "standard input", "JSON object"]),
    ]:
        result = run("--model", "m", *flags, stdin=piped)
        assert_refused(result, *words)
        assert len(result.stderr.splitlines()) == 1
    assert engine.made == []


def test_nothing_is_read_from_a_terminal(
    engine: type[FakeEngine], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.setattr(sys, "stdin", Terminal("hello"))
    with pytest.raises(click.UsageError, match="no prompt"):
        unispec(["generate", "--model", "m"], standalone_mode=False)
    assert sys.stdin.read() == "hello"


def test_a_prompt_that_is_not_utf8_is_refused(engine: type[FakeEngine]) -> None:
    assert_refused(run("--model", "m", "--prompt", os.fsdecode(b"\xff")), "--prompt", "UTF-8")


def test_a_prompt_in_utf8_is_read_whatever_the_locale_is() -> None:
    """Where the locale is ASCII, Python hands over the bytes that it cannot read as surrogates."""
    given = "\u00fcber".encode().decode("ascii", "surrogateescape")
    prompts = PromptOptions(prompt=given, prompt_file=None, image=(), chat_template=True)
    assert prompts.texts == ("\u00fcber",)


def test_a_refusing_chat_template_is_reported(engine: type[FakeEngine], model: Path) -> None:
    engine.chat_template = "{{ raise_exception('a system message is required') }}"
    assert_refused(
        run("--model", model, "--prompt", "hello"),
        "a system message is required",
        "--no-chat-template",
    )
