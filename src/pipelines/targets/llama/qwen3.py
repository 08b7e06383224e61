"""Qwen3: Llama's layers, each query and key head normed before it is rotated."""

from __future__ import annotations

from dataclasses import dataclass, replace

from .family import LLAMA
from .stack_config import StackConfig

__all__ = ["QWEN3", "Qwen3Config"]


@dataclass(kw_only=True)
class Qwen3Config(StackConfig):
    """A Qwen3 stack."""

    qk_norm: bool = True


QWEN3 = replace(
    LLAMA,
    model_type="qwen3",
    architecture="Qwen3ForCausalLM",
    example_repo_id="Qwen/Qwen3-8B",
    config=Qwen3Config,
)
"""Qwen3, dense."""
