"""Llama as a target."""

from __future__ import annotations

from max.pipelines.lib import MAXModelConfig

from unispec.pipelines.unified.checkpoint import Checkpoint, read_checkpoint
from unispec.pipelines.unified.model import UnifiedModel
from unispec.pipelines.unified.target import TargetFamily

from .stack import Llama3
from .stack_config import StackConfig
from .weights import llama3_state_dict

__all__ = ["LLAMA"]


def _read(model_config: MAXModelConfig, stack: StackConfig) -> Checkpoint:
    return read_checkpoint(model_config)


LLAMA = TargetFamily(
    name="llama3",
    model_type="llama",
    architecture="LlamaForCausalLM",
    example_repo_id="HuggingFaceTB/SmolLM2-135M-Instruct",
    config=StackConfig,
    read=_read,
    state=llama3_state_dict,
    stack=Llama3,
    model=UnifiedModel,
)
"""Llama 2 to 3.2; its relatives replace a few of these."""
