"""What a step brought for one request, as it crosses back to the API process."""

from __future__ import annotations

from dataclasses import dataclass, fields

from max.pipelines.context import GenerationStatus, TextGenerationOutput
from max.pipelines.request import RequestID
from typing_extensions import Self

from unispec.pipelines.runtime.proposals import Source

__all__ = ["ServedOutput"]


@dataclass(kw_only=True)
class ServedOutput(TextGenerationOutput):
    """MAX's output, with what became of the drafts; MAX's own decoder ignores these fields."""

    drafted: int = 0
    """Draft tokens of this request that the step verified; 0 where there were none."""
    accepted: int = 0
    """How many of them stood."""
    source: Source | None = None
    """Who proposed them."""

    @classmethod
    def of(
        cls,
        output: TextGenerationOutput,
        *,
        drafted: int,
        accepted: int,
        source: Source | None = None,
    ) -> Self:
        """The same output as one of this class."""
        copied = {each.name: getattr(output, each.name) for each in fields(TextGenerationOutput)}
        return cls(**copied, drafted=drafted, accepted=accepted, source=source)

    @classmethod
    def failed(cls, request_id: RequestID) -> Self:
        """Says that nothing more will come, though the answer has no end.

        No answer that ends by itself has this status: it ends at a token or at its length.
        """
        return cls(request_id=request_id, tokens=[], final_status=GenerationStatus.CANCELLED)
