"""Help, and what is imported for it."""

from __future__ import annotations

import os
import re
import subprocess
import sys

from click.testing import CliRunner

from unispec.cli import unispec


def test_help_as_a_module() -> None:
    shown = subprocess.run(
        [sys.executable, "-m", "unispec.cli", "generate", "--help"],
        capture_output=True,
        text=True,
        check=True,
        env=dict(os.environ),  # importing max changes it behind Python's back
    )
    assert shown.stdout.startswith("Usage: unispec generate")
    assert shown.stderr == ""
    flags = """--model --model-path --weight-path --draft-model-path --speculative-method
        --num-speculative-tokens --devices --max-length --max-new-tokens --max-batch-size
        --temperature --top-k --top-p --min-p --presence-penalty --frequency-penalty
        --repetition-penalty --seed --stop --ignore-eos --prompt --quantization-encoding
        --enable-prefix-caching --no-enable-prefix-caching --prompt-file --no-chat-template
        --json-schema --regex --json --logprobs --no-speculation --image"""
    assert set(flags.split()) <= set(re.findall(r"--[a-z-]+", shown.stdout))


def test_help_and_wrong_options_import_nothing_heavy() -> None:
    script = """
import sys
from unispec.cli import unispec
for arguments in (
    ["generate", "--help"],
    ["generate", "--model", "m", "--top-p", "2"],
    ["train", "--help"],
    ["train", "--epochs", "0"],
):
    try:
        unispec(arguments)
    except SystemExit:
        pass
print(sorted({"max", "numpy", "rich", "torch", "transformers"} & set(sys.modules)))
"""
    done = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        text=True,
        check=True,
        env=dict(os.environ),
    )
    assert done.stdout.splitlines()[-1] == "[]"


def test_no_command_shows_help() -> None:
    result = CliRunner().invoke(unispec, [])
    assert result.exit_code == 2
    assert "generate" in result.stderr
