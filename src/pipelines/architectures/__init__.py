"""The documented architectures, a package each, and the registry of all that run.

`ARCHITECTURES` lists what is implemented as MAX's registry takes it:
`max generate --custom-architectures unispec.pipelines.architectures ...`. Everything behind
it is imported when it is first asked for.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from max.pipelines.lib import Speculator, SupportedArchitecture

    ARCHITECTURES: list[SupportedArchitecture | Speculator]

__all__ = ["ARCHITECTURES"]


def __getattr__(name: str) -> Any:
    if name == "ARCHITECTURES":
        from .max_entries import for_commands

        return for_commands()
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
