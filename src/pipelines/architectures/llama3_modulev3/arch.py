"""Registration with MAX: a Llama target alone, with `--prefer-module-v3`."""

from __future__ import annotations

from ..llama3.config import Llama3Config
from ..llama3.registration import llama3_architecture
from .model import Llama3Model

__all__ = ["ARCHITECTURE"]

ARCHITECTURE = llama3_architecture("LlamaForCausalLM_ModuleV3", Llama3Model, Llama3Config)
"""The entry of MAX's registry."""
