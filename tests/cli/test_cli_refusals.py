"""Options that are refused: one line and status 2, before anything is loaded."""

from __future__ import annotations

from pathlib import Path

import pytest
from fake_engine import FakeEngine, assert_refused, run

from unispec.errors import InputError


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("--prompt hello", ["Missing option", "--model"]),
        ("--model m", ["--prompt", "--prompt-file"]),
        ("--model m --prompt a --prompt-file {file}", ["--prompt", "--prompt-file", "exclude"]),
        ("--model m --prompt-file nowhere", ["--prompt-file", "nowhere", "No such file"]),
        ("--model m --prompt-file {empty}", ["--prompt-file", "{empty}", "no prompt"]),
        ("--model m --prompt-file {gap}", ["--prompt-file", "{gap}", "line 2"]),
        ("--model m --prompt-file {binary}", ["--prompt-file", "{binary}", "UTF-8"]),
        ("--model m --prompt a --image nowhere.png", ["--image", "nowhere.png", "not exist"]),
        ("--model m --prompt a --image {folder}", ["--image", "{folder}", "is a directory"]),
        (
            "--model m --prompt-file {file} --image {empty}",
            ["--image {empty}", "--prompt", "--prompt-file"],
        ),
        ("--model m --prompt a --json-schema nowhere", ["--json-schema", "nowhere"]),
        ("--model m --prompt a --json-schema {file}", ["--json-schema", "{file}", "line 1"]),
        ("--model m --prompt a --json-schema {deep}", ["--json-schema", "{deep}", "nested"]),
        ("--model m --prompt a --json-schema {number}", ["--json-schema", "no JSON schema"]),
        (
            "--model m --prompt a --json-schema {schema} --regex x",
            ["--json-schema", "--regex", "exclude"],
        ),
        ("--model m --prompt a --weight-path nowhere", ["--weight-path", "nowhere"]),
        ("--model m --prompt a --num-speculative-tokens 0", ["-tokens", "'0'", "positive"]),
        ("--model m --prompt a --num-speculative-tokens fast", ["'fast'", "'auto'"]),
        ("--model m --prompt a --num-speculative-tokens auto", ["auto", "no speculative method"]),
        (
            "--model m --prompt a --speculative-method ngram --num-speculative-tokens 32",
            ["32", "1 to 31 with ngram"],
        ),
        (
            "--model m --prompt a --speculative-method ngram --draft-model-path d",
            ["--draft-model-path d", "ngram has no draft"],
        ),
        (
            "--model m --prompt a --num-speculative-tokens-per-batch-size [[2,3,1]]",
            ["[2, 3, 1] does not begin at 1"],
        ),
        (
            "--model m --prompt a --num-speculative-tokens-per-batch-size 1-4:3",
            ["'1-4:3' is no JSON", "[[1, 4, 3], [5, 8, 1]]"],
        ),
        ("--model m --prompt a --prompt-lookup-min 0", ["-lookup-min", "0", "x>=1"]),
        (
            "--model m --prompt a --draft-model-path d --speculative-method eagle"
            " --num-speculative-tokens 9",
            ["num_speculative_tokens is 9", "1 to 8", "eagle"],
        ),
        ("--model m --prompt a --num-speculative-tokens 3", ["3", "no speculative method"]),
        (
            "--model m --prompt a --draft-model-path d --speculative-method oracle",
            ["--speculative-method", "oracle", "eagle"],
        ),
        ("--model m --prompt a --speculative-method eagle", ["eagle", "--draft-model-path"]),
        ("--model m --prompt a --draft-model-path d", ["d", "--speculative-method", "eagle"]),
        ("--model m --prompt a --devices tpu", ["--devices", "tpu", "gpu:ID"]),
        ("--model m --prompt a --temperature -0.1", ["--temperature", "-0.1", "0<=x<=2"]),
        ("--model m --prompt a --logprobs 5", ["--logprobs", "--json"]),
        ("--model m --prompt a --json --logprobs 21", ["--logprobs", "21", "0<=x<=20"]),
        ("--model m --prompt a --json --logprobs -1", ["--logprobs", "-1", "0<=x<=20"]),
        ("--model m --prompt a --temperature nan", ["--temperature", "nan"]),
        ("--model m --prompt a --temperature warm", ["--temperature", "warm"]),
        ("--model m --prompt a --top-k -2", ["--top-k", "-2"]),
        ("--model m --prompt a --top-p 1.5", ["--top-p", "1.5"]),
        ("--model m --prompt a --top-p nan", ["--top-p", "nan"]),
        ("--model m --prompt a --min-p 2", ["--min-p", "2"]),
        ("--model m --prompt a --presence-penalty 3", ["--presence-penalty", "3"]),
        ("--model m --prompt a --frequency-penalty -3", ["--frequency-penalty", "-3"]),
        ("--model m --prompt a --repetition-penalty 0", ["--repetition-penalty", "0"]),
        ("--model m --prompt a --repetition-penalty inf", ["--repetition-penalty", "inf"]),
        ("--model m --prompt a --seed -1", ["--seed", "-1"]),
        ("--model m --prompt a --max-new-tokens 0", ["--max-new-tokens", "0"]),
        ("--model m --prompt a --max-length 0", ["--max-length", "0"]),
        ("--model m --prompt a --max-batch-size 0", ["--max-batch-size", "0"]),
        ("--model m --prompt a --quantization-encoding q9", ["-encoding", "q9", "bfloat16"]),
        ("--model m --prompt a --warp", ["--warp"]),
    ],
)
def test_wrong_options_are_one_line_before_anything_is_loaded(
    engine: type[FakeEngine], tmp_path: Path, arguments: str, words: list[str]
) -> None:
    contents = {
        "file": b"hello\n",
        "empty": b"\n\n",
        "gap": b"hello\n\nworld\n",
        "binary": b"\xff\xfe",
        "number": b"3",
        "deep": b'{"a":' * 100_000,
        "schema": b"{}",
    }
    files = {name: tmp_path / name for name in contents}
    for name, content in contents.items():
        files[name].write_bytes(content)
    files["folder"] = tmp_path
    result = run(*arguments.format(**files).split())
    assert_refused(result, *(word.format(**files) for word in words))
    assert len(result.stderr.splitlines()) == 1
    assert engine.made == []


@pytest.mark.parametrize("flag", ["--prompt", "--stop", "--regex"])
def test_empty_text_is_refused(engine: type[FakeEngine], flag: str) -> None:
    others = [] if flag == "--prompt" else ["--prompt", "hello"]
    assert_refused(run("--model", "m", *others, flag, ""), flag, "empty")


@pytest.mark.parametrize("flags", [[], ["--json"]])
def test_what_the_engine_refuses_is_one_line(
    engine: type[FakeEngine], model: Path, flags: list[str]
) -> None:
    def refuse() -> None:
        raise InputError("the prompt has 99 tokens,\n  more than 64")

    engine.during_generate = staticmethod(refuse)
    assert_refused(
        run("--model", model, "--prompt", "hello", *flags),
        "error: the prompt has 99 tokens, more than 64",
    )


@pytest.mark.parametrize(
    "content",
    ["{", "[]", '{"temperature": 9.5}', '{"top_p": "high"}', '{"do_sample": "no"}'],
)
def test_a_wrong_generation_config_is_named(
    engine: type[FakeEngine], model: Path, content: str
) -> None:
    (model / "generation_config.json").write_text(content)
    assert_refused(run("--model", model, "--prompt", "hello"), "generation_config.json")
