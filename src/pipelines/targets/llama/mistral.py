"""Mistral: Llama's layers under another name.

A sliding window must not be shorter than the longest sequence.
"""

from __future__ import annotations

from dataclasses import replace

from .family import LLAMA

__all__ = ["MISTRAL"]

MISTRAL = replace(
    LLAMA,
    model_type="mistral",
    architecture="MistralForCausalLM",
    example_repo_id="mistralai/Mistral-7B-Instruct-v0.3",
)
"""Mistral and Ministral, 7B and 8B."""
