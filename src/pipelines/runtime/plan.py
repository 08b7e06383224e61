"""The memory plan of a pipeline that no server planned."""

from __future__ import annotations

from max.pipelines.lib import MemoryPlan

__all__ = ["default_memory_plan"]


def default_memory_plan(max_batch_size: int, max_seq_len: int) -> MemoryPlan:
    """A plan of these sizes that reserves nothing; `max_seq_len` is in tokens."""
    return MemoryPlan(
        planned_max_batch_size=max_batch_size, footprint=0, planned_max_length=max_seq_len
    )
