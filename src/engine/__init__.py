"""The engine: answers prompts with a target and its draft on this machine."""

from __future__ import annotations

from unispec.batch_schedule import BatchSchedule
from unispec.pipelines.runtime.metrics import StepTimes

from .config import EngineConfig
from .engine import Engine
from .requests import (
    Output,
    Report,
    Request,
    Result,
    SpeculationReport,
    Step,
    StepRow,
    TokenLogprobs,
)

__all__ = [
    "BatchSchedule",
    "Engine",
    "EngineConfig",
    "Output",
    "Report",
    "Request",
    "Result",
    "SpeculationReport",
    "Step",
    "StepRow",
    "StepTimes",
    "TokenLogprobs",
]
