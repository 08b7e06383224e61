"""The timers of `unispec generate` may be late on a CPU."""

from __future__ import annotations

import sys

import pytest
from runs import run_python

COMMAND = """
import ctypes, sys, threading
from unittest import mock
from unispec.cli import unispec
from unispec import engine

prctl = ctypes.CDLL(None).prctl
SET, GET = 29, 30
prctl(SET, 50_000, 0, 0, 0)

class Engine:
    def __init__(self, *_, **__):
        slack = [prctl(GET, 0, 0, 0, 0)]
        other = threading.Thread(target=lambda: slack.append(prctl(GET, 0, 0, 0, 0)))
        other.start()
        other.join()
        print(*slack, file=sys.__stdout__)
        sys.exit(0)

with (
    mock.patch.object(engine, "Engine", Engine),
    mock.patch("unispec.commands.generate.check_checkpoints"),
):
    unispec(["generate", "--model", "any", "--prompt", "hello", "--devices", sys.argv[1]])
"""


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux has the setting")
@pytest.mark.parametrize(("devices", "nanoseconds"), [("cpu", 20_000_000), ("gpu", 50_000)])
def test_on_a_cpu_a_command_and_its_threads_have_late_timers(
    devices: str, nanoseconds: int
) -> None:
    assert run_python(COMMAND, devices) == f"{nanoseconds} {nanoseconds}"
