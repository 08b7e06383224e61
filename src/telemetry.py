"""What a command's process reports to MAX's maker: nothing, unless the user asks for it.

MAX 26.7 sends logs with an id of the installation when a session begins, and its server sends
metrics, logs and the model's name. Each has a switch of its own.
"""

from __future__ import annotations

import os
from typing import Final

__all__ = ["turn_off_telemetry"]

_ENGINE: Final = "MODULAR_TELEMETRY_ENABLED"
_SERVER: Final = "OTEL_SDK_DISABLED"
_ON: Final = ("1", "true", "yes", "on")


def turn_off_telemetry() -> None:
    """Turns both off, for this process and those it starts; call it before MAX is imported.

    Who has turned on `MODULAR_TELEMETRY_ENABLED` is left with what MAX does then.
    """
    if os.environ.get(_ENGINE, "").strip().lower() in _ON:
        return
    os.environ[_ENGINE] = "0"
    # The server's Prometheus endpoint stays: nothing leaves by it unless somebody asks.
    os.environ.setdefault(_SERVER, "true")
