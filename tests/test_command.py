"""The command as a user types it, on the demo model, in a process of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from reference.target import TargetReference, assert_same_greedy

from unispec.checkpoints.demo import DEMO_METHODS, demo_draft_folder
from unispec.engine import Engine
from unispec.methods import Method

PROMPTS = ("What is the capital of France?", "Write one sentence about rain.")
NEW_TOKENS = 32


@pytest.mark.parametrize("method", DEMO_METHODS)
def test_generate_answers_as_the_target_does(
    demo_model: Path,
    demo_engines: Callable[[Method], Engine],
    demo_target: TargetReference,
    tmp_path: Path,
    method: Method,
) -> None:
    engine = demo_engines(method)
    engine.load()  # its graph is in the cache now
    (tmp_path / "prompts").write_text("\n".join(PROMPTS))
    options = {
        "--model": demo_model,
        "--draft-model-path": demo_draft_folder(method),
        "--speculative-method": method,
        "--num-speculative-tokens": 5,
        "--max-batch-size": 8,
        "--max-length": 2048,
        "--prompt-file": tmp_path / "prompts",
        "--max-new-tokens": NEW_TOKENS,
        "--temperature": 0,
    }
    given = [str(part) for option in options.items() for part in option]
    done = subprocess.run(
        [sys.executable, "-m", "unispec.cli", "generate", "--json", *given],
        env=dict(os.environ),  # a loaded model adds to the native environment behind Python's back
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert [result["prompt"] for result in report["results"]] == list(PROMPTS)
    for result in report["results"]:
        prompt = engine.tokenizer.apply_chat_template(
            [{"role": "user", "content": result["prompt"]}],
            add_generation_prompt=True,
            return_dict=False,
        )
        answer = result["token_ids"]
        trace = demo_target.greedy(prompt, NEW_TOKENS, engine.eos_token_ids, guess=answer)
        assert_same_greedy(answer, trace)
        assert result["text"] == engine.tokenizer.decode(answer, skip_special_tokens=True)
        assert 0 < result["accepted"] < result["drafted"]
    assert 1 < report["mean_acceptance_length"] < 6
    assert len(report["acceptance_per_position"]) == 5
    assert report["time_to_first_token_s"] > 0
    assert report["step_time_s"] > 0
