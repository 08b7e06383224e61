"""Options that cannot be used are refused in one line, the slow imports aside where they can."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import gguf
import numpy as np
import pytest
from damages import SOUND, WEIGHTS, CompileReachedError, Damage, assert_refused, check, content, run
from hub import running_hub
from runs import run_python
from tiny import TinyPair


def renamed(name: str) -> Damage:
    return lambda pair: (pair.target / WEIGHTS).rename(pair.target / name)


def truncated_gguf(pair: TinyPair) -> None:
    writer = gguf.GGUFWriter(pair.target / "cut.gguf", "llama")
    writer.add_tensor("token_embd.weight", np.ones((64, 64), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    (pair.target / "cut.gguf").write_bytes((pair.target / "cut.gguf").read_bytes()[:-1000])


CHAINED = json.dumps(
    {"$ref": "#/$defs/0"}
    | {"$defs": {str(at): {"$ref": f"#/$defs/{at + 1}"} for at in range(5000)} | {"5000": {}}}
)

FLAG_CASES: Mapping[str, tuple[Damage, list[str], list[str]]] = {
    "model that is not there": (SOUND, ["--model", "/nowhere/m"], ["/nowhere/m", "check"]),
    "relative model": (SOUND, ["--model", "nowhere"], ["nowhere does not exist", "check"]),
    "nested model": (SOUND, ["--model", "a/b/c"], ["a/b/c does not exist", "check"]),
    "empty model": (SOUND, ["--model", ""], ["empty", "give"]),
    "model of an unknown user": (SOUND, ["--model", "~no-one/m"], ["~no-one/m", "check"]),
    "model with an endless name": (SOUND, ["--model", "/" + "a" * 5000], ["aaa", "check"]),
    "model is a file": (
        SOUND,
        ["--model", "{target}/config.json"],
        ["{target}/config.json is a file", "folder"],
    ),
    "no repository's name": (SOUND, ["--model", "a b/c"], ["a b/c", "check the path"]),
    "draft that is not there": (SOUND, ["--draft-model-path", "./d"], ["./d", "check"]),
    "weight path that is not there": (
        SOUND,
        ["--weight-path", "{target}/none.gguf"],
        ["--weight-path", "{target}/none.gguf", "does not exist"],
    ),
    "weight path of another format": (
        renamed("pytorch_model.bin"),
        ["--weight-path", "{target}/pytorch_model.bin"],
        ["{target}/pytorch_model.bin", "unknown format", "give .safetensors"],
    ),
    "damaged GGUF": (
        content("target", "bad.gguf", b"GGUF" + b"\xff" * 500),
        ["--weight-path", "{target}/bad.gguf"],
        ["{target}/bad.gguf", "damaged GGUF", "again"],
    ),
    "truncated GGUF": (
        truncated_gguf,
        ["--weight-path", "{target}/cut.gguf"],
        ["{target}/cut.gguf", "truncated", "again"],
    ),
    "no GGUF at all": (
        content("target", "text.gguf", "hello, world"),
        ["--weight-path", "{target}/text.gguf"],
        ["{target}/text.gguf", "not a safetensors", "convert"],
    ),
    "GGUF beside safetensors": (
        truncated_gguf,
        ["--weight-path", "{target}/cut.gguf", "--weight-path", "{target}/model.safetensors"],
        ["2 weight files", "GGUF", "alone"],
    ),
    "K = 0": (SOUND, ["--num-speculative-tokens", "0"], ["-tokens'", "'0'", "positive integer"]),
    "K = 9": (SOUND, ["--num-speculative-tokens", "9"], ["tokens is 9", "1 to 8", "eagle"]),
    "unknown method": (
        SOUND,
        ["--speculative-method", "oracle"],
        ["--speculative-method", "'oracle'", "'eagle'"],
    ),
    "max_length beyond the model": (
        SOUND,
        ["--max-length", "513"],
        ["max_length 513", "max_position_embeddings 512", "choose at most 512"],
    ),
    "max_length beyond the model, alone": (
        SOUND,
        ["--max-length", "513", "--no-speculation"],
        ["max_length 513", "max_position_embeddings 512", "choose at most 512"],
    ),
    "unknown device": (SOUND, ["--devices", "gpuu"], ["--devices", "'gpuu'", "'gpu:ID'"]),
    "no GPU": (SOUND, ["--devices", "gpu"], ["devices 'gpu'", "0 GPUs", "use 'cpu'"]),
    "no such GPU": (SOUND, ["--devices", "gpu:7"], ["devices 'gpu:7'", "0 GPUs", "use 'cpu'"]),
    "unknown encoding": (
        SOUND,
        ["--quantization-encoding", "q5_1"],
        ["--quantization-encoding", "'q5_1'", "'float32'"],
    ),
    "encoding that a CPU lacks": (
        SOUND,
        ["--quantization-encoding", "float8_e4m3fn"],
        ["'float8_e4m3fn'", "on a CPU", "use 'float32'"],
    ),
    "schema is no JSON": (
        content("target", "schema", "{"),
        ["--json-schema", "{target}/schema"],
        ["--json-schema", "{target}/schema", "line 1"],
    ),
    "schema of an unknown type": (
        content("target", "schema", '{"type": "strin"}'),
        ["--json-schema", "{target}/schema"],
        ["JSON schema", "strin", "give"],
    ),
    "schema nested 3,000 deep": (
        content("target", "schema", '{"a":' * 3000 + "1" + "}" * 3000),
        ["--json-schema", "{target}/schema"],
        ["schema", "nested", "deep"],
    ),
    "schema of 5,000 chained references": (
        content("target", "schema", CHAINED),
        ["--json-schema", "{target}/schema"],
        ["JSON schema", "more than 1000 of its references", "give"],
    ),
    "schema with a number that is rounded": (
        content("target", "schema", '{"maximum": 9007199254740993}'),
        ["--json-schema", "{target}/schema"],
        ["JSON schema", "maximum 9007199254740993", "2^53", "give"],
    ),
    "regex that is not closed": (SOUND, ["--regex", "("], ["regex '('", "unclosed", "give"]),
    "regex with look-ahead": (SOUND, ["--regex", "(?=a)b"], ["'(?=a)b'", "look-a", "give"]),
    "negative temperature": (SOUND, ["--temperature", "-1"], ["--temperature", "-1", "0<=x<=2"]),
    "top_p < 0": (SOUND, ["--top-p", "-0.1"], ["--top-p", "-0.1", "0<=x<=1"]),
    "top_p > 1": (SOUND, ["--top-p", "1.1"], ["--top-p", "1.1", "0<=x<=1"]),
    "endless top_k": (
        SOUND,
        ["--top-k", "9" * 20],
        ["--top-k", "9" * 20, f"x<={2**63 - 1}"],
    ),
    "seed beyond 64 bits": (SOUND, ["--seed", str(2**64)], ["--seed", str(2**64), "range"]),
    "empty prompt": (SOUND, ["--prompt", ""], ["--prompt is empty", "give"]),
    "prompt as long as max_length": (
        SOUND,
        ["--prompt", "hello", "--max-length", "5"],
        ["prompt 1 has 5 tokens", "max_length is 5", "shorten"],
    ),
    "prompt beyond max_length": (
        SOUND,
        ["--prompt", "x " * 400],
        ["prompt 1 has 800 tokens", "max_length is 512", "shorten"],
    ),
    "too few pages": (
        SOUND,
        ["--kv-cache-pages", "1", "--max-new-tokens", "300"],
        ["prompt 1", "305 tokens", "3 cache pages", "kv_cache_pages is 1", "raise"],
    ),
}


@pytest.mark.parametrize(
    ("damage", "flags", "words"),
    FLAG_CASES.values(),
    ids=[name.replace(" ", "-") for name in FLAG_CASES],
)
def test_flags(pair: TinyPair, damage: Damage, flags: list[str], words: list[str]) -> None:
    check(pair, damage, flags, words)


def test_a_machine_with_fewer_gpus(pair: TinyPair, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("unispec.engine.pipeline_config.accelerator_count", lambda: 2)
    check(pair, SOUND, ["--devices", "gpu:2"], ["'gpu:2'", "2 GPUs", "'gpu:0' to 'gpu:1'"])


@pytest.mark.parametrize("flag", ["--model", "--draft-model-path"])
def test_the_hub_does_not_have_it(
    pair: TinyPair, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, flag: str
) -> None:
    with running_hub(monkeypatch, tmp_path / "cache") as hub:
        words = ["no-one/nothing is neither", "check the path", "log in"]
        check(pair, SOUND, [flag, "no-one/nothing"], words)
        hub.go_down()
        words = ["no-one/nothing", "(", "Connection refused", ")", "path and the network"]
        check(pair, SOUND, [flag, "no-one/nothing"], words)


def test_a_process_of_its_own_with_the_hub_switched_off(pair: TinyPair) -> None:
    command = [sys.executable, "-m", "unispec.cli", "generate", "--prompt", "hello"]
    command += ["--model", str(pair.target), "--draft-model-path", "no-one/nothing"]
    command += ["--speculative-method", "eagle"]
    # MAX sets PYTHONEXECUTABLE behind Python's back; a child must not inherit it.
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert_refused(
        done.returncode,
        done.stdout,
        done.stderr,
        "no-one/nothing is no local folder",
        "check the path",
    )


def test_a_wrong_path_is_told_before_anything_slow_is_imported(
    pair: TinyPair, tmp_path: Path
) -> None:
    """MAX, transformers and torch take seconds each."""
    (pair.target / WEIGHTS).rename(pair.target / "pytorch_model.bin")
    good = ["--draft-model-path", str(pair.draft), "--speculative-method", "eagle"]
    train = ["train", "--output", str(tmp_path / "out"), "--speculative-method", "eagle"]
    generate = ["generate", "--prompt", "hello"]
    commands = {
        "folder /nowhere/m does not exist": [*generate, "--model", "/nowhere/m"],
        "folder /nowhere/t does not exist": [*train, "--model", "/nowhere/t"],
        f"{tmp_path} has no config.json": [*generate, "--model", str(tmp_path)],
        f"{pair.target} holds no .safetensors": [*generate, "--model", str(pair.target), *good],
        "folder /nowhere/d does not exist": [
            *[*generate, "--model", str(pair.draft), *good],
            *["--draft-model-path", "/nowhere/d"],
        ],
    }
    said = run_python(WITHOUT_IMPORTS, json.dumps([*commands.values()]))
    lines, imported = json.loads(said)
    for expected, line in zip(commands, lines, strict=True):
        assert line.startswith(f"error: {expected}"), line
    assert imported == []


WITHOUT_IMPORTS = """
import json, sys
from click.testing import CliRunner
from unispec.cli import unispec

lines = [CliRunner().invoke(unispec, command).stderr for command in json.loads(sys.argv[1])]
imported = sorted({"max", "numpy", "torch", "transformers"} & set(sys.modules))
print(json.dumps([lines, imported]))
"""


def test_what_is_sound_reaches_the_compile(pair: TinyPair) -> None:
    with pytest.raises(CompileReachedError):
        run(pair, "--seed", str(2**64 - 1), "--max-length", "512", "--num-speculative-tokens", "8")
