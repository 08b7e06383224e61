"""Llama 3 text generation on the ModuleV3 API."""

from __future__ import annotations

from unispec.pipelines.targets.llama.config import Llama3Config

from .inputs import Llama3Inputs
from .model import Llama3Model

__all__ = ["Llama3Config", "Llama3Inputs", "Llama3Model"]
