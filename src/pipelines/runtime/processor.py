"""The processor of this machine, as Linux names it."""

from __future__ import annotations

import platform
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Final

__all__ = ["features", "name"]

_CPU_INFO: Final = Path("/proc/cpuinfo")
# What a compiler may use beyond the architecture's own instructions.
_INSTRUCTIONS: Final = (
    "abm",
    "adx",
    "aes",
    "amx",
    "avx",
    "bmi",
    "f16c",
    "fma",
    "gfni",
    "movbe",
    "pclmulqdq",
    "popcnt",
    "sha_ni",
    "sse",
    "ssse",
    "vaes",
    "vpclmulqdq",
)


def name() -> str:
    """What it is called."""
    return _field("model name") or platform.processor()


def features() -> list[str]:
    """The sets of instructions that it has, as Linux spells them, in order."""
    flags = (_field("flags") or _field("Features") or "").split()
    return sorted(
        flag for flag in flags if platform.machine() != "x86_64" or flag.startswith(_INSTRUCTIONS)
    )


@cache
def _field(field: str) -> str | None:
    """The first value of a field of the processor's description."""
    with suppress(OSError):
        for line in _CPU_INFO.read_text().splitlines():
            key, _, value = line.partition(":")
            if key.strip() == field:
                return value.strip()
    return None
