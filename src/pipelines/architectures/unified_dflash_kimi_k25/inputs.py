"""Inputs of the unified Kimi K2.5 graph in their documented order."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from max.driver import Buffer

from unispec.pipelines.runtime.inputs import PersistentInputBuffers
from unispec.pipelines.targets.kimi.inputs import KIMI_ORDER, KimiK2_5ModelInputs

__all__ = ["UNIFIED_ORDER", "PersistentInputBuffers", "UnifiedDflashKimiK25Inputs"]

_RENAMED = {
    "kv_cache_inputs": ("target_kv_cache",),
    "draft_tokens": ("draft_tokens", "draft_kv_cache"),
}

UNIFIED_ORDER = tuple(taken for name in KIMI_ORDER for taken in _RENAMED.get(name, (name,)))
"""As `KIMI_ORDER`, with the draft's cache behind the draft tokens."""


@dataclass
class UnifiedDflashKimiK25Inputs(KimiK2_5ModelInputs):
    """One step's inputs; the bases say what the other fields hold.

    The draft's cache is part of `kv_cache_inputs`, under the name `draft`.
    """

    GRAPH_ORDER: ClassVar[tuple[str, ...]] = UNIFIED_ORDER
    NOT_TAKEN: ClassVar[tuple[str, ...]] = (*KimiK2_5ModelInputs.NOT_TAKEN, "token_bitmasks")

    tokens: Buffer
    input_row_offsets: Buffer
    signal_buffers: list[Buffer]
    host_input_row_offsets: Buffer
    batch_context_lengths: list[Buffer]
    image_token_indices: list[Buffer] | None = None
    precomputed_image_embeddings: list[Buffer] | None = None
    pixel_values: list[Buffer] | None = None
    grid_thws: list[Buffer] | None = None
    cu_seqlens: list[Buffer] | None = None
    max_seqlen: list[Buffer] | None = None
    vision_position_ids: list[Buffer] | None = None
    language_image_embeddings: list[Buffer] = field(default_factory=list)
    language_image_token_indices: list[Buffer] = field(default_factory=list)
    draft_tokens: Buffer | None = None
    draft_kv_blocks: list[Buffer] | None = None
    seed: Buffer | None = None
    temperature: Buffer | None = None
    top_k: Buffer | None = None
    max_k: Buffer | None = None
    top_p: Buffer | None = None
    min_top_p: Buffer | None = None
    in_thinking_phase: Buffer | None = None
    token_bitmasks: Buffer | None = None
    """Not taken: grammar masks are `token_bitmask`."""
