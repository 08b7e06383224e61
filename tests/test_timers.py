"""A command's timers may be late."""

from __future__ import annotations

import sys

import pytest
from runs import run_python

COMMAND = """
import ctypes, threading
from unittest import mock
import unispec.cli

prctl = ctypes.CDLL(None).prctl
SET, GET = 29, 30
prctl(SET, 50_000, 0, 0, 0)

def show(**_):
    found = [prctl(GET, 0, 0, 0, 0)]
    other = threading.Thread(target=lambda: found.append(prctl(GET, 0, 0, 0, 0)))
    other.start()
    other.join()
    print(*found)

with mock.patch.object(unispec.cli, "restart_with_jemalloc"):
    with mock.patch.object(unispec.cli, "unispec", show):
        unispec.cli.main()
"""


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux has the setting")
def test_a_command_and_its_threads_have_late_timers() -> None:
    assert run_python(COMMAND) == "20000000 20000000"
