"""On a GPU: a step waits for masks that come late, and ends in an error if they never come."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

LIMIT_S = 900
"""For the program, most of it to compile; a GPU that waits forever fails the test here."""


@pytest.fixture(scope="module")
def said() -> dict[str, Any]:
    """What `late_masks_steps.py` says; a process of its own, as nothing ends a GPU that hangs."""
    program = Path(__file__).parent.parent / "late_masks_steps.py"
    done = subprocess.run(
        [sys.executable, str(program)],
        capture_output=True,
        text=True,
        check=False,
        timeout=LIMIT_S,
    )
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def test_masks_that_come_late_decide(said: dict[str, Any]) -> None:
    assert said["free"] == said["best"]
    assert said["late"] == said["allowed"] != said["best"]
    assert said["waited"]


def test_masks_that_never_come_end_in_an_error(said: dict[str, Any]) -> None:
    assert said["error"] == "the masks of a step did not come in 2 s"


def test_the_next_step_is_not_touched_by_that(said: dict[str, Any]) -> None:
    assert said["after"] == said["allowed"]
