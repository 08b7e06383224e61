"""Inputs of the unified DFlash graph in their documented order."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from max.driver import Buffer
from max.pipelines.lib.interfaces.pipeline_model import UnifiedSpecDecodeInputs

from unispec.pipelines.runtime.inputs import PersistentInputBuffers, StepModelInputs

__all__ = ["PersistentInputBuffers", "UnifiedDflashLlama3Inputs"]


@dataclass
class UnifiedDflashLlama3Inputs(StepModelInputs, UnifiedSpecDecodeInputs):
    """One step's inputs; `StepModelInputs` says what each field holds.

    Grammar masks are `token_bitmask`; the pinned and scratch buffers of MAX's own
    pipeline are not taken.
    """

    NOT_TAKEN: ClassVar[tuple[str, ...]] = (
        *StepModelInputs.NOT_TAKEN,
        "lora",
        "pinned_bitmask",
        "wait_payload",
        "device_bitmask_scratch",
        "structured_output",
        "draft_slot_ids",
        "draft_block_offsets",
    )

    tokens: Buffer
    input_row_offsets: Buffer
    return_n_logits: Buffer
    lora: object | None = field(default=None, kw_only=True)
    """Not taken."""
    pinned_bitmask: Buffer | None = field(default=None, kw_only=True)
    """Not taken."""
    wait_payload: Buffer | None = field(default=None, kw_only=True)
    """Not taken."""
    device_bitmask_scratch: Buffer | None = field(default=None, kw_only=True)
    """Not taken."""
    structured_output: bool = field(default=False, kw_only=True)
    """Not taken."""
