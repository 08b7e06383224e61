"""The pipeline that drives a unified graph: batches, caches, stop rules, and an engine on top."""

from __future__ import annotations

from .config import EngineConfig
from .engine import Engine
from .metrics import StepTimes
from .requests import Output, Report, Request, Result

__all__ = ["Engine", "EngineConfig", "Output", "Report", "Request", "Result", "StepTimes"]
