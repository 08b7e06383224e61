"""`max generate` as a user types it writes what an engine answers."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from max.pipelines.context import SamplingParams
from tiny import TinyPair
from tiny.checkpoint import read, write

from unispec.engine import Engine, Request

PROMPT = "hello there"
ANSWER = 30


def ascii_of(text: str) -> str:
    """MAX decodes the tokens of each step alone, and loses characters of several bytes."""
    return "".join(char for char in text if char.isascii() and char.isprintable())


@pytest.mark.compiles("llama_eagle_agreeing")
def test_max_generate_runs_a_draft(
    tiny_pair: Callable[[str], TinyPair], eagle_engine: Engine, tmp_path: Path
) -> None:
    """A draft in float16 in a folder below the current one: the options that README names."""
    pair = tiny_pair("llama_eagle_agreeing")
    assert pair.draft is not None
    config, tensors = read(pair.draft)
    halves = {
        name: each.astype(np.float16) if each.dtype == np.float32 else each
        for name, each in tensors.items()
    }
    (tmp_path / "draft").mkdir()
    write(tmp_path / "draft", config, halves)
    options = {
        "--model": str(pair.target),
        "--custom-architectures": "unispec.pipelines.architectures",
        "--devices": "cpu",
        "--draft-model-path": "draft",
        "--draft-quantization-encoding": "float32",
        "--draft-weight-path": "model.safetensors",
        "--speculative-method": "eagle",
        "--num-speculative-tokens": "4",
        "--prompt": PROMPT,
        "--max-new-tokens": str(ANSWER),
        "--temperature": "0",
    }
    done = subprocess.run(
        [
            Path(sys.executable).parent / "max",
            "generate",
            *(t for pair in options.items() for t in pair),
        ],
        # Importing MAX changes what a child inherits where it is not given.
        env=dict(os.environ),
        cwd=tmp_path,
        capture_output=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr.decode(errors="replace")
    tokens = eagle_engine.tokenizer.encode(PROMPT)
    sampling = SamplingParams(temperature=0, max_new_tokens=ANSWER)
    result = eagle_engine.generate([Request(token_ids=tokens, sampling=sampling)]).results[0]
    assert len(result.token_ids) > 10
    assert ascii_of(result.text) in ascii_of(done.stdout.decode(errors="replace"))
