"""Inputs of the DeepSeek-V3 graphs in their documented order."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from max.driver import Buffer
from max.dtype import DType
from max.graph import BufferType, DeviceRef, TensorType
from max.nn.comm import Signals
from max.nn.comm.ep import EPBatchManager, EPConfig
from max.pipelines.lib import ModelInputs

from unispec.pipelines.runtime.inputs import StepModelInputs
from unispec.sampling.inputs import SAMPLING_PARAMETERS

__all__ = ["DEEPSEEK_ORDER", "DeepseekV3Inputs", "DistributedInputs", "distributed_types"]

_DOCUMENTED = (
    "tokens",
    "input_row_offsets",
    "host_input_row_offsets",
    "return_n_logits",
    "data_parallel_splits",
    "signal_buffers",
    "kv_cache_inputs",
    "batch_context_lengths",
    "ep_inputs",
    "draft_tokens",
    "seed",
    "temperature",
    "top_k",
    "max_k",
    "top_p",
    "min_top_p",
)

DEEPSEEK_ORDER = (
    *_DOCUMENTED,
    "known_next_tokens",
    "num_speculative_tokens",
    *(name for name in SAMPLING_PARAMETERS if name not in _DOCUMENTED),
)
"""The graph's inputs: the documented ones in their order, then those that unispec adds."""


def distributed_types(
    devices: Sequence[DeviceRef], ep: EPConfig | None = None
) -> dict[str, Sequence[TensorType | BufferType]]:
    """Graph input types of `DistributedInputs`.

    Args:
        devices: where the graph runs; their attention shares one batch, or each has rows of it.
        ep: how they share experts in the second case.
    """
    cpu = DeviceRef.CPU()
    replicas = len(devices) if ep else 1
    return {
        "host_input_row_offsets": [TensorType(DType.uint32, ["num_row_offsets"], device=cpu)],
        "data_parallel_splits": [TensorType(DType.int64, [replicas + 1], device=cpu)],
        "signal_buffers": Signals(devices).input_types() if len(devices) > 1 else [],
        "batch_context_lengths": [TensorType(DType.int32, [1], device=cpu) for _ in devices],
        "ep_inputs": EPBatchManager(ep).input_types() if ep else [],
    }


@dataclass(kw_only=True)
class DistributedInputs(ModelInputs):
    """What a graph takes that may run on several devices."""

    tokens: Buffer
    """As in `StepModelInputs`, of all replicas one after the other."""
    input_row_offsets: Buffer
    """As in `StepModelInputs`, likewise."""
    signal_buffers: list[Buffer]
    """uint8, one a GPU: where GPUs signal each other; empty on a single device."""
    host_input_row_offsets: Buffer
    """uint32 `[B + 1]` on the host: `input_row_offsets` once more."""
    batch_context_lengths: list[Buffer]
    """int32 `[1]` on the host, one a device: tokens of its rows when the step has run, drafts
    included, each row's rounded up to whole pages. What a prefill on a GPU expands."""
    data_parallel_splits: Buffer
    """int64 `[replicas + 1]` on the host: where each replica's rows start."""
    ep_inputs: tuple[Buffer, ...] = ()
    """Where GPUs send tokens to each other's experts, see `max.nn.comm.ep`; empty where they share
    experts by tensor parallelism."""


@dataclass(kw_only=True)
class DeepseekV3Inputs(StepModelInputs, DistributedInputs):
    """One step's inputs; the bases say what each field holds."""

    GRAPH_ORDER: ClassVar[tuple[str, ...]] = DEEPSEEK_ORDER
