"""Steps of an acceptance rule on a GPU whose masks come late, or never; prints JSON.

A process of its own: a GPU whose stream waits for a flag that nobody raises cannot be stopped.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from time import monotonic, sleep
from typing import Any

import numpy as np
from max.driver import Accelerator, Buffer, CompletionFlag, Device
from max.dtype import DType
from max.engine import InferenceSession
from max.graph import DeviceRef, Graph, TensorType

from unispec.sampling.acceptance import Matching, Verification
from unispec.sampling.buffers import SamplingBuffers
from unispec.sampling.inputs import BITMASK, RowSampling, SamplingInputs, sampling_types
from unispec.sampling.late_masks import LATE_MASKS, AfterMasks, late_mask_types

__all__ = ["VOCAB", "LateMasks", "build_graph"]

VOCAB = 64
WORDS = VOCAB // 32
BEST, ALLOWED = 7, 35
"""The token of the largest logit, and the only one that late masks allow."""

DEADLINE_S = 2.0


def build_graph(device: DeviceRef) -> Graph:
    """One row without drafts, greedy; the graph's inputs end with `LATE_MASKS`."""
    sampling = {k: v for k, v in sampling_types(device, VOCAB).items() if k != BITMASK}
    late = late_mask_types(device, VOCAB)
    types = [
        TensorType(DType.float32, ["batch", "num_positions", VOCAB], device),
        TensorType(DType.int64, ["batch", "num_drafts"], device),
        TensorType(DType.int64, ["batch"], device),
        *sampling.values(),
        *(kind for kinds in late.values() for kind in kinds),
    ]
    with Graph("late_masks", input_types=types) as graph:
        inputs = iter(graph.inputs)
        logits, drafts, first = (next(inputs).tensor for _ in range(3))
        parameters = {name: next(inputs).tensor for name in sampling}
        masks: dict[str, Any] = {name: [next(inputs)] for name in LATE_MASKS}
        step = Verification(logits.rebind(["batch", drafts.shape[1] + 1, VOCAB]), drafts, first)
        rule = AfterMasks(Matching(), masks)
        # It takes the masks' place until they are there.
        known = SamplingInputs(**parameters, **{BITMASK: masks["pinned_bitmask"][0].tensor})
        graph.output(rule(step, known).next_tokens)
    return graph


class LateMasks:
    """The compiled graph, and the flag that its stream waits for."""

    def __init__(self, device: Device) -> None:
        self._device = device
        graph = build_graph(DeviceRef.from_device(device))
        self._model = InferenceSession(devices=[device]).load(graph)
        self._flag, self._raised = CompletionFlag(device), 0
        self._pinned = Buffer(DType.int32, [1, 1, WORDS], device, pinned=True)
        self._scratch = Buffer.zeros([1, 1, WORDS], DType.int32, device)
        buffers = SamplingBuffers(1, VOCAB, 1, device)
        filled = buffers.fill([RowSampling(seed=0, temperature=0.0)], buffers.bitmask(1, 1))
        self._sampling = [value for name, value in filled.items() if name != BITMASK]
        logits = np.zeros((1, 1, VOCAB), np.float32)
        logits[..., BEST], logits[..., ALLOWED] = 5, 1
        given = (logits, np.zeros((1, 0), np.int64), np.zeros(1, np.int64))
        self._given = [Buffer.from_numpy(value).to(device) for value in given]

    def step(self, complete: Callable[[LateMasks], None]) -> int:
        """The token of one step.

        Args:
            complete: called when the step is under way; calls `allow` once, or never.

        Raises:
            TimeoutError: nobody raised the flag before the deadline; the GPU is free again.
        """
        self._pinned.to_numpy()[...] = -1
        wanted = self._raised + 1
        payload = Buffer.from_numpy(np.array([self._flag._unsafe_ptr, wanted], np.int64))
        (token,) = self._model.execute(
            *self._given, *self._sampling, self._pinned, payload, self._scratch
        )
        done = self._device.default_queue.record_event()
        complete(self)
        end = monotonic() + DEADLINE_S
        while not done.is_ready():
            if monotonic() > end:
                # Else the stream would wait for as long as the process lives.
                self._raise()
                done.synchronize()
                raise TimeoutError(f"the masks of a step did not come in {DEADLINE_S:.0f} s")
            sleep(0.001)
        return int(token.to_numpy()[0])

    def allow(self, *tokens: int) -> None:
        """Completes the masks: these tokens only, of none all."""
        words = np.zeros(WORDS, np.uint32)
        for token in tokens:
            words[token // 32] |= np.uint32(1 << token % 32)
        self._pinned.to_numpy()[...] = words.view(np.int32) if tokens else -1
        self._raise()

    def _raise(self) -> None:
        self._raised += 1
        self._flag.signal(self._raised)


def main() -> None:
    device = Accelerator()
    masks, waited = LateMasks(device), []

    def later(masks: LateMasks) -> None:
        event = device.default_queue.record_event()
        sleep(0.5)
        waited.append(not event.is_ready())
        masks.allow(ALLOWED)

    said: dict[str, Any] = {"best": BEST, "allowed": ALLOWED}
    said["free"] = masks.step(lambda one: one.allow())
    said["late"] = masks.step(later)
    said["waited"] = all(waited)
    try:
        masks.step(lambda one: None)
    except TimeoutError as error:
        said["error"] = str(error)
    said["after"] = masks.step(lambda one: one.allow(ALLOWED))
    print(json.dumps(said))


if __name__ == "__main__":
    main()
