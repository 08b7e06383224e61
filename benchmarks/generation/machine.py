"""What the numbers were measured on."""

from __future__ import annotations

import os
import platform
from importlib.metadata import version
from pathlib import Path

__all__ = ["describe", "load_average"]

_PACKAGES = ("max", "torch", "transformers", "numpy")


def describe() -> dict[str, object]:
    """Processor, memory, load and the versions that matter."""
    return {
        "processor": _processor(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "system": platform.platform(),
        "python": platform.python_version(),
        "versions": {package: version(package) for package in _PACKAGES},
        "load_average": load_average(),
    }


def load_average() -> float:
    """Processes that ran or waited to run, mean of the last minute."""
    return os.getloadavg()[0]


def _processor() -> str:
    """The first processor's name as Linux gives it, else the architecture's."""
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        name, _, value = line.partition(":")
        if name.strip() == "model name":
            return value.strip()
    return platform.machine()
