"""Inputs of the unified MTP graph in their documented order."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from max.driver import Buffer

from ..deepseekV3.inputs import DeepseekV3Inputs

__all__ = ["UnifiedMTPDeepseekV3Inputs"]


@dataclass
class UnifiedMTPDeepseekV3Inputs(DeepseekV3Inputs):
    """One step's inputs; the bases say what the other fields hold."""

    NOT_TAKEN: ClassVar[tuple[str, ...]] = (
        *DeepseekV3Inputs.NOT_TAKEN,
        "pinned_bitmask",
        "wait_payload",
        "device_bitmask_scratch",
    )

    tokens: Buffer
    input_row_offsets: Buffer
    signal_buffers: list[Buffer]
    host_input_row_offsets: Buffer
    batch_context_lengths: list[Buffer]
    draft_tokens: Buffer | None = None
    draft_kv_blocks: list[Buffer] | None = None
    seed: Buffer | None = None
    temperature: Buffer | None = None
    top_k: Buffer | None = None
    max_k: Buffer | None = None
    top_p: Buffer | None = None
    min_top_p: Buffer | None = None
    in_thinking_phase: Buffer | None = None
    pinned_bitmask: Buffer | None = None
    """bool `[B, K + 1, V]` on the host: the allowed tokens. `UnifiedMTPDeepseekV3Model.execute`
    packs it into `token_bitmask`, which the graph takes."""
    wait_payload: Buffer | None = None
    """Not taken: a step begins when its masks are complete."""
    device_bitmask_scratch: Buffer | None = None
    """Not taken: likewise."""
