"""Granite: Llama's layers, scaled where they meet."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, replace
from typing import ClassVar

from .family import LLAMA
from .stack_config import StackConfig

__all__ = ["GRANITE", "GraniteConfig"]


@dataclass(kw_only=True)
class GraniteConfig(StackConfig):
    """A Granite stack: it has all of the multipliers that `Llama3Config` reads."""

    CONSTANTS: ClassVar[Collection[str]] = (
        "attention_multiplier",
        "embedding_multiplier",
        "residual_multiplier",
        "logits_scaling",
    )


GRANITE = replace(
    LLAMA,
    model_type="granite",
    architecture="GraniteForCausalLM",
    example_repo_id="ibm-granite/granite-3.3-8b-instruct",
    config=GraniteConfig,
)
"""Granite 3, dense."""
