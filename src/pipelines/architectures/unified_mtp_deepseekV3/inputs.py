"""Inputs of the unified MTP graph in their documented order."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from max.driver import Buffer

from unispec.pipelines.runtime.inputs import PersistentInputBuffers
from unispec.pipelines.targets.deepseek.inputs import DeepseekV3Inputs
from unispec.sampling.late_masks import with_late_masks

__all__ = ["PersistentInputBuffers", "UnifiedMTPDeepseekV3Inputs"]


@dataclass
class UnifiedMTPDeepseekV3Inputs(DeepseekV3Inputs):
    """One step's inputs; the bases say what the other fields hold."""

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
    """The allowed tokens, on the host: bool `[B, K + 1, V]`, which
    `UnifiedMTPDeepseekV3Model.execute` packs into `token_bitmask`, or, for a graph with late masks,
    packed already, see `LATE_MASKS`."""
    wait_payload: Buffer | None = None
    """int64 `[2]` on the host: what a graph with late masks waits for; not taken by others."""
    device_bitmask_scratch: Buffer | None = None
    """int32 `[B, K + 1, ceil(V / 32)]` on the GPU: likewise, where it copies the masks to."""

    @property
    def graph_order(self) -> Sequence[str]:
        """As of every DeepSeek-V3 graph; late masks stand in place of `token_bitmask`."""
        return self.GRAPH_ORDER if self.wait_payload is None else with_late_masks(self.GRAPH_ORDER)
