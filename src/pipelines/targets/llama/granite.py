"""Granite: Llama's layers, scaled where they meet."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from .family import LLAMA
from .stack_config import StackConfig

__all__ = ["GRANITE", "GraniteConfig"]


@dataclass(kw_only=True)
class GraniteConfig(StackConfig):
    """A Granite stack: it has all of the multipliers that `Llama3Config` reads."""

    FIXED: ClassVar[Mapping[str, Any]] = {"clip_qkv": None}


GRANITE = replace(
    LLAMA,
    model_type="granite",
    architecture="GraniteForCausalLM",
    example_repo_id="ibm-granite/granite-3.3-8b-instruct",
    config=GraniteConfig,
)
"""Granite 3, dense."""
