"""The least that a step can take: all that it must read, at the speed of a plain copy."""

from __future__ import annotations

from time import perf_counter

from max.driver import Buffer, Device
from max.dtype import DType

from .shapes import NUMBER_BYTES, DraftShape, Shape, numbers

__all__ = ["copy_bytes_per_s", "step_bytes"]

_PASSES = 10


def step_bytes(shape: Shape, draft: DraftShape, rows: int, context: int) -> int:
    """Bytes that a step reads at least.

    The target's weights and keys and values are read once, whatever is verified, the draft's and
    the head once a pass. Of the embedding only the tokens' rows are, which is nothing. No cache of
    a GPU holds any of it until the next pass.

    Args:
        rows: of the batch.
        context: tokens of each row that are in the cache.
    """
    head = numbers({"head": shape.ends["lm_head.weight"]})
    layers = shape.layers * numbers(shape.layer(0))
    cached = 2 * shape.key_heads * shape.head_dim * rows * context  # keys and values of a layer
    target = layers + head + shape.layers * cached
    a_pass = numbers(draft.tensors(shape)) + head + draft.layers * cached
    return NUMBER_BYTES * (target + draft.passes * a_pass)


def copy_bytes_per_s(device: Device, size: int) -> float:
    """Bytes that the fastest of some copies on the device reads and writes in a second.

    Args:
        size: bytes to copy, many times what a cache holds.
    """
    source, target = (Buffer.zeros([size], DType.uint8, device) for _ in range(2))
    times = []
    for _ in range(_PASSES):
        device.synchronize()
        begin = perf_counter()
        target.inplace_copy_from(source)
        device.synchronize()
        times.append(perf_counter() - begin)
    return 2 * size / min(times)
