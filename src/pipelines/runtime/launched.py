"""A step that runs, or has run, and was not read yet."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from max.pipelines.context import TextContext
from max.pipelines.request import RequestID

from .inputs import StepModelInputs
from .outputs import StepModelOutputs
from .readback import Reading

__all__ = ["Launched"]


@dataclass(frozen=True)
class Launched:
    """What the device works on."""

    request_ids: Sequence[RequestID]
    """Its rows, in order."""
    inputs: StepModelInputs
    """Whose memory the step after it may write."""
    outputs: StepModelOutputs
    """On the device."""
    reading: Reading
    """What the host needs of them."""
    width: int
    """Drafts of a row that it verifies."""
    proposals: int
    """Tokens of a row that it proposes."""
    began_s: float
    """When it was enqueued, by `perf_counter`."""

    def places(self, contexts: Sequence[TextContext]) -> list[int] | None:
        """The row of each of these requests; None: one of them has none."""
        rows = {name: index for index, name in enumerate(self.request_ids)}
        found = [rows.get(context.request_id) for context in contexts]
        return [index for index in found if index is not None] if None not in found else None
