"""`unispec train`: it makes a draft, goes on after a kill, and refuses what it cannot use."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner, Result
from safetensors.torch import load_file
from small_training import METHODS, PROMPTS
from tiny import TinyPair

from unispec.cli import unispec
from unispec.engine import Engine, EngineConfig
from unispec.methods import Method

pytestmark = pytest.mark.usefixtures("one_thread")


def run(*arguments: object) -> Result:
    return CliRunner().invoke(unispec, ["train", *map(str, arguments)])


@pytest.fixture
def prompt_file(tmp_path: Path) -> Path:
    path = tmp_path / "prompts"
    path.write_text("\n".join(PROMPTS))
    return path


@METHODS
def test_the_command_makes_a_draft_that_generate_loads(
    tiny_pair: Callable[[str], TinyPair], tmp_path: Path, prompt_file: Path, method: Method
) -> None:
    model, output = tiny_pair("llama_eagle_agreeing").target, tmp_path / "draft"
    given: list[object] = ["--model", model, "--speculative-method", method, "--output", output]
    given += ["--prompts", prompt_file, "--tokens", 1500, "--epochs", 1, "--no-chat-template"]
    given += ["--max-new-tokens", 32, "--draft-vocab-size", 100]
    done = run(*given)
    assert done.exit_code == 0, done.output
    assert "Held-out length" in done.stderr
    record = json.loads((output / "training.json").read_text())
    assert record["settings"]["dtype"] == "float32"
    assert record["settings"]["sequences"] > record["settings"]["held-out sequences"] > 0
    assert record["measures"][-1]["length"] == 1 + sum(record["measures"][-1]["acceptance"])
    assert (output / "training.png").read_bytes().startswith(b"\x89PNG")
    assert "Held-out acceptance" in (output / "README.md").read_text()
    assert "/" not in (output / "config.json").read_text()  # no folder of this machine
    assert load_file(output / "model.safetensors")["d2t"].shape == (100,)
    # Reads the configurations of both and refuses what does not fit.
    Engine(EngineConfig(model=str(model), draft_model=str(output), speculative_method=method))

    again = run(*given)
    assert again.exit_code == 2
    assert f"{output} is not empty; give resume=True (--resume)" in again.stderr.replace("\n", "")
    weights = (output / "model.safetensors").read_bytes()
    assert run(*given, "--resume").exit_code == 0
    assert (output / "model.safetensors").read_bytes() == weights
    other = run(*given, "--resume", "--max-new-tokens", 16)
    assert other.exit_code == 2
    assert "was collected with max_new_tokens 32, not 16" in other.stderr
    other = run(*given, "--resume", "--dtype", "bfloat16")
    assert other.exit_code == 2
    assert "was collected with dtype 'float32', not 'bfloat16'" in other.stderr.replace("\n", "")

    onwards = [*given, "--dtype", "bfloat16", "--draft-model-path", output]
    onwards[onwards.index("--output") + 1] = tmp_path / "onwards"
    done = run(*onwards)
    assert done.exit_code == 0, done.output
    later = json.loads((tmp_path / "onwards" / "training.json").read_text())
    assert later["settings"]["dtype"] == "bfloat16"
    assert later["settings"]["initial draft"].startswith("draft, sha256 ")
    ended, began = record["measures"][-1]["length"], later["measures"][0]["length"]
    assert began == pytest.approx(ended, abs=0.1)  # other answers, by a target in bfloat16
    onwards[onwards.index("--output") + 1] = tmp_path / "other"
    other = run(*onwards, "--draft-layers", 5)
    assert other.exit_code == 2
    said = "an EAGLE-3 draft has 1" if method == "eagle3" else "where this draft has 5"
    assert said in other.stderr.replace("\n", " ")
    assert not (tmp_path / "other").exists()


def test_a_command_that_is_killed_twice(
    tiny_pair: Callable[[str], TinyPair], tmp_path: Path, prompt_file: Path
) -> None:
    """By SIGKILL: while it collects, and while it fits. What comes out is what would have."""
    given = ["--model", tiny_pair("llama_eagle_agreeing").target, "--speculative-method", "eagle"]
    given += ["--prompts", prompt_file, "--tokens", 5000, "--epochs", 2, "--no-chat-template"]
    given += ["--max-new-tokens", 48]
    output = tmp_path / "killed"
    command = [sys.executable, "-m", "unispec.cli", "train", *map(str, given), "--resume"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    for sign in ("data/shard-00000.safetensors", "training/collected.json"):
        process = subprocess.Popen(
            [*command, "--output", str(output)], env=environment, stderr=subprocess.PIPE
        )
        while not (output / sign).exists():
            assert process.poll() is None, process.communicate()[1].decode()
            time.sleep(0.01)
        process.kill()
        process.communicate()
        assert not (output / "config.json").exists()
        assert not [path for path in output.rglob("*") if ".tmp" in path.name]
    assert run(*given, "--output", output, "--resume").exit_code == 0
    assert run(*given, "--output", tmp_path / "whole").exit_code == 0
    ours, theirs = (
        load_file(tmp_path / name / "model.safetensors") for name in ("killed", "whole")
    )
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        pytest.param({"--no-chat-template": None}, "no chat template", id="no-chat-template"),
        pytest.param({"--tokens": 5, "--minutes": 1}, "exclude each other", id="two-ends"),
        pytest.param(
            {"--own-prompts": True}, "--own-prompts and --no-chat-template exclude", id="own"
        ),
        pytest.param({"--device": "cuda"}, "torch finds no GPU", id="cuda"),
        pytest.param({"--draft-vocab-size": 300}, "300 is beyond the target's 256", id="vocab"),
        pytest.param({"--model": "/nowhere"}, "/nowhere", id="no-model"),
        pytest.param({"--minutes": 0}, "0", id="no-time"),
    ],
)
def test_options_that_are_refused(
    tiny_pair: Callable[[str], TinyPair],
    tmp_path: Path,
    prompt_file: Path,
    monkeypatch: pytest.MonkeyPatch,
    changes: dict[str, object],
    message: str,
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    options: dict[str, object] = {
        "--model": tiny_pair("llama_eagle_agreeing").target,
        "--speculative-method": "eagle",
        "--output": tmp_path / "draft",
        "--prompts": prompt_file,
        "--tokens": 10,
        "--max-new-tokens": 8,
        "--no-chat-template": True,
    } | changes
    if "--minutes" in changes and "--tokens" not in changes:
        del options["--tokens"]
    given: list[object] = []
    for name, value in options.items():
        given += [name] if value is True else [] if value is None else [name, value]
    done = run(*given)
    assert done.exit_code == 2
    assert message in done.stderr
    assert "Traceback" not in done.output


@pytest.mark.parametrize(
    ("text", "message"),
    [("", "holds no prompt"), ("one\n\ntwo", "line 2"), ("only one", "give at least two")],
)
def test_prompt_files_that_are_refused(
    tiny_pair: Callable[[str], TinyPair], tmp_path: Path, text: str, message: str
) -> None:
    path = tmp_path / "prompts"
    path.write_text(text)
    given = [
        "--model",
        tiny_pair("llama_eagle_agreeing").target,
        "--speculative-method",
        "eagle",
        "--prompts",
        path,
    ]
    done = run(*given, "--output", tmp_path / "draft", "--no-chat-template")
    assert done.exit_code == 2
    assert message in done.stderr
