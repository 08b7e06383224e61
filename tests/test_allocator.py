"""A command's process allocates with the jemalloc that MAX ships."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from unispec.allocator import jemalloc

SHOW = """
import os, sys
from unispec.allocator import restart_with_jemalloc
restart_with_jemalloc()
print(
    sys.argv[1:],
    "jemalloc" in open("/proc/self/maps").read(),
    os.environ.get("MODULAR_MAX_ALLOCATOR_REEXEC"),
    os.environ.get("LD_PRELOAD", "").split(":")[1:],
    os.environ.get("MALLOC_CONF"),
)
"""

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="MAX ships jemalloc for Linux only")


def shown(**environment: str) -> str:
    """What a process with these variables, and none that this one was given, says of itself."""
    names = (
        "LD_PRELOAD",
        "MALLOC_CONF",
        "MODULAR_MAX_ALLOCATOR",
        "MODULAR_MAX_ALLOCATOR_REEXEC",
    )
    inherited = {name: value for name, value in os.environ.items() if name not in names}
    done = subprocess.run(
        [sys.executable, "-c", SHOW, "--flag", "two words"],
        env=inherited | environment,
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stderr == ""
    return done.stdout.strip()


def test_a_process_starts_anew_with_its_arguments() -> None:
    assert shown() == "['--flag', 'two words'] True 1 [] thp:always"


@pytest.mark.parametrize(
    "environment",
    [
        pytest.param({"MODULAR_MAX_ALLOCATOR": "system"}, id="switched-off"),
        pytest.param({"MODULAR_MAX_ALLOCATOR_REEXEC": "1"}, id="restarted-in-vain"),
    ],
)
def test_a_process_that_keeps_its_allocator(environment: dict[str, str]) -> None:
    assert shown(**environment).startswith("['--flag', 'two words'] False")


def test_a_process_that_has_it_does_not_start_anew() -> None:
    library = jemalloc()
    assert library is not None
    assert shown(LD_PRELOAD=str(library)).endswith("True None [] None")


def test_another_preloaded_library_stays_preloaded() -> None:
    loaded = Path("/proc/self/maps").read_text().split()
    other = next(path for path in loaded if Path(path).name.startswith("libm."))
    assert shown(LD_PRELOAD=other).endswith(f"True 1 ['{other}'] thp:always")


def test_what_the_user_set_holds() -> None:
    assert shown(MALLOC_CONF="thp:never").endswith("thp:always,thp:never")
