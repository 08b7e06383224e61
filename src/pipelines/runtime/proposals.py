"""What is at hand for one request, and what became of it so far."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Final, Literal, get_args

from unispec.pipelines.lookup.automaton import SuffixAutomaton
from unispec.pipelines.policy.estimates import DraftEstimate, MatchEstimate

from .metrics import Acceptance

__all__ = ["SOURCES", "Outlook", "RowSpeculation", "Source"]

Source = Literal["draft", "ngram"]
"""Who proposed: the draft, or a match of the text's end with what stands before."""

SOURCES: Final[tuple[Source, ...]] = get_args(Source)
"""Every `Source`."""


@dataclass
class Outlook:
    """What one row has at hand for a step; at [n] the tokens that come true of the first n."""

    draft: list[int] = field(default_factory=list)
    """What the draft proposed."""
    draft_expected: list[float] = field(default_factory=lambda: [0.0])
    """Of these, one entry more than there are."""
    match: list[int] = field(default_factory=list)
    """What followed the match."""
    match_length: int = 0
    """Tokens that agree."""
    match_expected: list[float] = field(default_factory=lambda: [0.0])
    """As of the draft."""

    def best(self, width: int) -> tuple[Source, list[int]]:
        """The proposals that promise more if `width` are verified."""
        draft = self.draft_expected[min(width, len(self.draft))]
        match = self.match_expected[min(width, len(self.match))]
        if match > draft:
            return "ngram", self.match[:width]
        return "draft", self.draft[:width]


class RowSpeculation:
    """What is known of one request's proposals.

    Args:
        draft: what all requests teach of the draft.
        match: likewise of matches.

    Attributes:
        draft: likewise, with what this request taught.
        match: likewise.
        automaton: the text so far.
        outlook: what the next step, or the last one, has at hand.
        source: who proposed what that step verifies.
        acceptance: what became of the drafts of each source.
    """

    def __init__(self, draft: DraftEstimate, match: MatchEstimate) -> None:
        self.draft = DraftEstimate(draft)
        self.match = MatchEstimate(match)
        self.automaton = SuffixAutomaton()
        self.outlook = Outlook()
        self.source: Source = "draft"
        self.acceptance = {source: Acceptance() for source in SOURCES}

    def drop_text(self) -> None:
        """Frees what only further steps would need."""
        self.automaton = SuffixAutomaton()
        self.outlook = Outlook()
