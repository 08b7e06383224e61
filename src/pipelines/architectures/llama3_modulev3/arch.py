"""Registration with MAX: a Llama target alone, with `--prefer-module-v3`."""

from __future__ import annotations

from unispec.pipelines.architectures.registration import text_architecture
from unispec.pipelines.targets.llama.config import Llama3Config

from .model import Llama3Model

__all__ = ["ARCHITECTURE"]

ARCHITECTURE = text_architecture(
    "LlamaForCausalLM_ModuleV3",
    Llama3Model,
    Llama3Config,
    example_repo_id="HuggingFaceTB/SmolLM2-135M-Instruct",
)
"""The entry of MAX's registry."""
