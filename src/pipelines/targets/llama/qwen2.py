"""Qwen2 and Qwen2.5: Llama's layers, the q, k and v projections with a bias."""

from __future__ import annotations

from dataclasses import dataclass, replace

from .family import LLAMA
from .stack_config import StackConfig

__all__ = ["QWEN2", "Qwen2Config"]


@dataclass(kw_only=True)
class Qwen2Config(StackConfig):
    """A Qwen2 stack."""

    qkv_bias: bool = True

    def __post_init__(self) -> None:
        # transformers' Qwen2 has no other biases, whatever config.json says.
        self.attention_bias = False
        super().__post_init__()


QWEN2 = replace(
    LLAMA,
    model_type="qwen2",
    architecture="Qwen2ForCausalLM",
    example_repo_id="Qwen/Qwen2.5-7B-Instruct",
    config=Qwen2Config,
)
"""Qwen2 and Qwen2.5, dense."""
