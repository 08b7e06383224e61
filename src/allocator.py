"""The allocator of a command's process.

MAX compiles inside the process that asks for it and allocates much: on a machine with two cores
a graph takes a third less time with jemalloc, which MAX ships, than with glibc. Its own command
line therefore starts itself anew with jemalloc; so does this one, under the same switch. Here it
asks for huge pages, too: weights in pages of 4 KiB make steps slower, by another amount each time.
"""

from __future__ import annotations

import os
import sys
from importlib.util import find_spec
from pathlib import Path

__all__ = ["jemalloc", "restart_with_jemalloc"]

_SWITCH = "MODULAR_MAX_ALLOCATOR"
_RESTARTED = "MODULAR_MAX_ALLOCATOR_REEXEC"
_OPTIONS = "MALLOC_CONF"
_HUGE_PAGES = "thp:always"


def jemalloc() -> Path | None:
    """The library of jemalloc that MAX has installed, if it has."""
    modular = find_spec("modular")
    folders = modular.submodule_search_locations if modular else None
    for folder in folders or ():
        library = Path(folder) / "lib" / "libjemalloc_preload.so"
        if library.is_file():
            return library
    return None


def restart_with_jemalloc() -> None:
    """Replaces this process by one that allocates with jemalloc; call it first of all.

    Returns where nothing is to be done: not on Linux, `MODULAR_MAX_ALLOCATOR` is anything but
    `jemalloc`, that is preloaded already, a sanitizer is preloaded, or MAX ships none.
    """
    library = jemalloc()
    preloaded = os.environ.get("LD_PRELOAD", "")
    if (
        sys.platform != "linux"
        or library is None
        or _RESTARTED in os.environ
        or os.environ.get(_SWITCH, "jemalloc") != "jemalloc"
        or library.name in preloaded
        or "libclang_rt" in preloaded
    ):
        return
    environment = {
        **os.environ,
        "LD_PRELOAD": f"{library}:{preloaded}" if preloaded else str(library),
        # Of two values of an option the last one holds: what the user set.
        _OPTIONS: ",".join(filter(None, (_HUGE_PAGES, os.environ.get(_OPTIONS)))),
        _RESTARTED: "1",
    }
    sys.stdout.flush()
    sys.stderr.flush()
    os.execve(sys.executable, sys.orig_argv, environment)
