"""On a CPU a command's threads wait asleep."""

from __future__ import annotations

import sys
import time

import pytest
from own_processors import COUNT
from prompts import random_prompt
from runs import answers, greedy_requests, observing, run_python

from unispec.engine import Engine, Step

BUSY_WAIT = ("MODULAR_THREAD_BUSY_WAIT_US", "MODULAR_RUNTIME_THREAD_BUSY_WAIT_TIME_US")

COMMAND = """
import ctypes, os, sys, threading
from unittest import mock
from unispec.cli import unispec

prctl = ctypes.CDLL(None).prctl
SET, GET = 29, 30
prctl(SET, 50_000, 0, 0, 0)

class Engine:
    def __init__(self, *_, **__):
        found = [prctl(GET, 0, 0, 0, 0)]
        other = threading.Thread(target=lambda: found.append(prctl(GET, 0, 0, 0, 0)))
        other.start()
        other.join()
        found += [os.environ.get(name) for name in sys.argv[2:]]
        print(*found, file=sys.__stdout__)
        sys.exit(0)

# Importing the real one imports MAX.
sys.modules["unispec.engine"] = mock.Mock(Engine=Engine)
with mock.patch("unispec.commands.generate.check_checkpoints"):
    unispec(["generate", "--model", "any", "--prompt", "hello", "--devices", sys.argv[1]])
"""


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux has late timers")
@pytest.mark.parametrize(
    ("devices", "given", "found"),
    [
        ("cpu", {}, "20000000 20000000 0 0"),
        ("cpu", {BUSY_WAIT[0]: "7"}, "20000000 20000000 7 7"),
        ("cpu", {BUSY_WAIT[1]: "7"}, "20000000 20000000 7 7"),
        ("gpu", {}, "50000 50000 None None"),
    ],
)
def test_a_command_and_its_threads(
    monkeypatch: pytest.MonkeyPatch, devices: str, given: dict[str, str], found: str
) -> None:
    for name in BUSY_WAIT:
        monkeypatch.delenv(name)
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    assert run_python(COMMAND, devices, *BUSY_WAIT) == found


def test_nothing_is_set_that_a_loaded_max_did_not_see(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its next session would end the process."""
    for name in BUSY_WAIT:
        monkeypatch.delenv(name)
    code = "import max.pipelines, os; from unispec.waiting import wait_asleep; wait_asleep()"
    assert run_python(f"{code}; print({BUSY_WAIT[0]!r} in os.environ)") == "False"


def test_threads_sleep_between_steps(engine: Engine) -> None:
    requests = greedy_requests([random_prompt(256, 20, seed=1)], 100, ignore_eos=True)
    answers(engine, requests)
    steps: list[Step] = []
    pause = 0.005

    def wait(step: Step) -> None:
        steps.append(step)
        time.sleep(pause)

    with observing(engine, wait):
        start = time.process_time()
        answers(engine, requests)
        used = time.process_time() - start
    in_steps = sum(step.times.wall_s for step in steps)
    assert len(steps) >= 16
    assert used < COUNT * in_steps + 0.5 * pause * len(steps)
