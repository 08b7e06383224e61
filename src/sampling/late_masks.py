"""Grammar masks that the host completes while a GPU runs the target already."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from max.dtype import DType
from max.graph import BufferType, DeviceRef, TensorType, Value, ops
from max.nn.kernels import inplace_memcpy, wait_host_value_with_dep

from .acceptance import AcceptanceRule, Accepted, Verification
from .inputs import BITMASK, SamplingInputs, sampling_types

__all__ = ["LATE_MASKS", "AfterMasks", "late_mask_types", "with_late_masks"]

LATE_MASKS = ("pinned_bitmask", "wait_payload", "device_bitmask_scratch")
"""The inputs of a graph that waits for its masks, in place of `token_bitmask`.

The first, on the host, and the last, on the GPU, are int32 `[B, K + 1, ceil(V / 32)]` as
`token_bitmask` is; the step copies one to the other. In between int64 `[2]` on the host: the
address of a `max.driver.CompletionFlag` and the value that it has when the first is complete, see
`max.nn.kernels.wait_host_value`.
"""


def with_late_masks(order: Sequence[str]) -> tuple[str, ...]:
    """Puts `LATE_MASKS` where `token_bitmask` is.

    Args:
        order: names of a graph's inputs.
    """
    index = order.index(BITMASK)
    return (*order[:index], *LATE_MASKS, *order[index + 1 :])


def late_mask_types(device: DeviceRef, vocab_size: int) -> dict[str, list[TensorType | BufferType]]:
    """Graph input types of `LATE_MASKS`.

    Args:
        device: the GPU that the masks are for.
    """
    cpu, mask = DeviceRef.CPU(), sampling_types(device, vocab_size)[BITMASK]
    types: tuple[TensorType | BufferType, ...] = (
        TensorType(mask.dtype, mask.shape, device=cpu),
        BufferType(DType.int64, [2], device=cpu),
        BufferType(mask.dtype, mask.shape, device=device),
    )
    return {name: [declared] for name, declared in zip(LATE_MASKS, types, strict=True)}


@dataclass(frozen=True)
class AfterMasks:
    """An acceptance rule that waits for the masks first."""

    rule: AcceptanceRule
    """Decides, with the complete masks."""
    inputs: Mapping[str, Sequence[Value[Any]]]
    """Those of the graph by name, `LATE_MASKS` among them."""

    def __call__(self, step: Verification, sampling: SamplingInputs) -> Accepted:
        """Returns the verdict of one step; the GPU's stream waits here until the flag is up.

        Args:
            sampling: the parameters of each row; its `token_bitmask` is replaced.
        """
        (pinned,), (payload,), (scratch,) = (self.inputs[name] for name in LATE_MASKS)
        masks = scratch.buffer
        # That both change the scratch keeps the copy behind the wait.
        wait_host_value_with_dep(payload.buffer, masks, masks.device)
        inplace_memcpy(masks, pinned.tensor)
        return self.rule(step, replace(sampling, token_bitmask=ops.buffer_load(masks)))
