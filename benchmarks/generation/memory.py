"""Process: what a step of unispec allocates on the host, and whether it grows with the steps.

What is held after a step may grow by the answer itself, its tokens, text and times: a few
hundred bytes. What a step needs in passing may not grow at all.
"""

from __future__ import annotations

import resource
import tracemalloc
from pathlib import Path
from typing import Final

import numpy as np
import numpy.typing as npt

from .ours import OurEngine
from .subprocesses import Json, serve

_SETTLED_STEP: Final = 50
"""The first step that is compared; by then lazy set-up is over."""
_PAGE_BYTES: Final = resource.getpagesize()


class _Recorder:
    """Reads the process's memory at the end of each step, into memory that it has already."""

    def __init__(self, max_steps: int) -> None:
        self.steps = 0
        self.held_bytes = np.zeros(max_steps, np.int64)
        """Traced Python and numpy memory in use."""
        self.transient_bytes = np.zeros(max_steps, np.int64)
        """How much more than that was in use at some time in the step."""
        self.resident_bytes = np.zeros(max_steps, np.int64)

    def step(self, num_tokens: int) -> None:
        if not tracemalloc.is_tracing():
            return
        held, peak = tracemalloc.get_traced_memory()
        self.held_bytes[self.steps] = held
        self.transient_bytes[self.steps] = peak - held
        self.resident_bytes[self.steps] = _resident_bytes()
        self.steps += 1
        tracemalloc.reset_peak()


def _resident_bytes() -> int:
    with open("/proc/self/statm") as statm:
        return int(statm.read().split()[1]) * _PAGE_BYTES


def _work(job: Json) -> Json:
    recorder = _Recorder(job["max_new_tokens"])
    ours = OurEngine(
        Path(job["model"]), job["method"], job["draft_tokens"], job["max_length"], recorder.step
    )
    # The first answer touches the cache's pages, which the second then finds resident.
    for traced in (False, True):
        if traced:
            tracemalloc.start()
        ours.generate(job["prompt"], job["max_new_tokens"], ignore_eos=True)
    compared = slice(_SETTLED_STEP, recorder.steps)
    transient = np.array_split(recorder.transient_bytes[compared], 4)
    return {
        "from_step": _SETTLED_STEP,
        "to_step": recorder.steps - 1,
        "held_bytes_per_step": _growth(recorder.held_bytes[compared]),
        "resident_bytes_per_step": _growth(recorder.resident_bytes[compared]),
        "transient_bytes_first_quarter": float(np.median(transient[0])),
        "transient_bytes_last_quarter": float(np.median(transient[-1])),
    }


def _growth(values: npt.NDArray[np.int64]) -> float:
    """Mean increase from one step to the next."""
    return float(values[-1] - values[0]) / (len(values) - 1)


if __name__ == "__main__":
    serve(lambda job: (_work(job), None))
