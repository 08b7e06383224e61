"""Whether weights fit the memory of this machine."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Final

from unispec.errors import InputError

__all__ = ["available_memory", "check_memory"]

_MEMINFO: Final = Path("/proc/meminfo")
# What a container may use, of cgroup 2 and 1; "max" stands for no limit.
_LIMITS: Final = (
    Path("/sys/fs/cgroup/memory.max"),
    Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"),
)


def available_memory() -> int:
    """Bytes of memory that a process can get: what is free, or can be freed at once.

    Where the system does not say, all that is built in. A container's limit counts as well.
    """
    pages = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    found = re.search(r"MemAvailable:\s*(\d+) kB", _read(_MEMINFO))
    sizes = [int(found[1]) * 1024 if found else pages]
    sizes += [int(limit) for path in _LIMITS if (limit := _read(path).strip()).isdecimal()]
    return min(sizes)


def check_memory(needed: int, source: Path, *, form: str = "numbers as float32") -> None:
    """Refuses weights that this machine cannot hold.

    Args:
        needed: bytes.
        form: how the numbers are counted, for the error.

    Raises:
        InputError: more is needed than there is.
    """
    available = available_memory()
    if needed > available:
        raise InputError(
            f"the weights of {source} need {needed / 1e9:.1f} GB of memory, {form}, and"
            f" this machine has {available / 1e9:.1f} GB free: use a smaller model, or a machine"
            " with more memory"
        )


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="ascii")
    except OSError:
        return ""
