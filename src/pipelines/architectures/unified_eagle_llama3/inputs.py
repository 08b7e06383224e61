"""Inputs of the unified EAGLE graph in their documented order."""

from __future__ import annotations

from dataclasses import dataclass

from max.driver import Buffer

from unispec.pipelines.runtime.inputs import PersistentInputBuffers, StepModelInputs

__all__ = ["PersistentInputBuffers", "UnifiedEagleLlama3Inputs"]


@dataclass
class UnifiedEagleLlama3Inputs(StepModelInputs):
    """One step's inputs; `StepModelInputs` says what each field holds."""

    tokens: Buffer
    input_row_offsets: Buffer
    return_n_logits: Buffer
    draft_tokens: Buffer | None = None
    draft_kv_blocks: list[Buffer] | None = None
    seed: Buffer | None = None
    temperature: Buffer | None = None
    top_k: Buffer | None = None
    max_k: Buffer | None = None
    top_p: Buffer | None = None
    min_top_p: Buffer | None = None
    in_thinking_phase: Buffer | None = None
