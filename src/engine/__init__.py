"""The engine: answers prompts with a target and its draft on this machine.

In all modules `config` is what the user states, `outbox` is that of the caller whose requests it
is about, and `name` is what errors call a prompt.
"""

from __future__ import annotations

from unispec.pipelines.runtime.metrics import StepTimes

from .config import EngineConfig
from .engine import Engine
from .requests import Output, Report, Request, Result, Step, StepRow

__all__ = [
    "Engine",
    "EngineConfig",
    "Output",
    "Report",
    "Request",
    "Result",
    "Step",
    "StepRow",
    "StepTimes",
]
