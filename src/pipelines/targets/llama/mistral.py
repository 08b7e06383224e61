"""Mistral: Llama's layers under another name.

A sliding window must not be shorter than the longest sequence.
"""

from __future__ import annotations

from dataclasses import replace

from .family import LLAMA

__all__ = ["MINISTRAL", "MISTRAL"]

MISTRAL = replace(
    LLAMA,
    model_type="mistral",
    architecture="MistralForCausalLM",
    example_repo_id="mistralai/Mistral-7B-Instruct-v0.3",
)
"""Mistral 7B."""

MINISTRAL = replace(
    MISTRAL,
    model_type="ministral",
    architecture="MinistralForCausalLM",
    example_repo_id="mistralai/Ministral-8B-Instruct-2410",
)
"""What transformers calls a Mistral whose config.json has `layer_types`."""
