"""What a step copies between host and GPU by itself: nothing, but for what MAX's experts count."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from gpu_compiles import GRAPHS

COUNTED = ["tensor<[2], ui32, gpu:0>", "cpu"]
"""Of MAX's FP8 experts: how many are used, and by how many tokens at most."""


@pytest.mark.parametrize("name", GRAPHS)
def test_nothing_is_copied_inside_of_a_step(name: str) -> None:
    script = Path(__file__).parent.parent / "gpu_compiles.py"
    done = subprocess.run(
        [sys.executable, str(script), "--only", name],
        env=dict(os.environ),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    # Of weights: the walk knows what a copy looks like.
    assert found["graph"]["operations"]["rmo.mo.transfer"] > 5
    copied = [copy for _, *copy in found["transfers"]]
    assert all(copy == COUNTED for copy in copied)
    assert bool(copied) is ("FP8" in name)
