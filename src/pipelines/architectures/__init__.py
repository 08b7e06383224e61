"""One package per architecture, plus the stacks that they share.

`ARCHITECTURES` lists what is implemented as MAX's registry takes it:
`max generate --custom-architectures unispec.pipelines.architectures ...`. Everything behind
it is imported when it is first asked for.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from max.pipelines.lib import SupportedArchitecture

    ARCHITECTURES: list[SupportedArchitecture]

__all__ = ["ARCHITECTURES"]


def __getattr__(name: str) -> Any:
    if name == "ARCHITECTURES":
        from .registry import architectures

        return architectures()
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
