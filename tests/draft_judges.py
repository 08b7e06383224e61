"""Compares what a graph proposed with an independent draft in torch, step by step."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from max.pipelines.request import RequestID
from reference.dflash import DFlashReference
from reference.eagle import EagleReference
from reference.eagle3 import Eagle3Reference
from reference.mtp import MtpReference
from reference.target import TargetReference
from runs import observing
from torch import Tensor
from transformers import DynamicCache

from unispec.engine import Engine, Step
from unispec.methods import Method

__all__ = [
    "JUDGES",
    "DFlashJudge",
    "Eagle3Judge",
    "EagleJudge",
    "Judge",
    "Proposal",
    "Recording",
    "recording",
]


@dataclass(frozen=True)
class Proposal:
    """What the graph proposed after a step."""

    token_ids: list[int]
    """Verified tokens, then the target's next token."""
    drafts: list[int]


Recording = dict[RequestID, list[Proposal]]


@contextmanager
def recording(engine: Engine) -> Iterator[Recording]:
    """Takes down each unfinished request's proposals after every step."""
    recorded: Recording = {}

    def record(step: Step) -> None:
        for one in step.rows:
            if one.row.drafts and not one.context.is_done:
                proposal = Proposal(one.context.tokens.all.tolist(), list(one.row.drafts))
                recorded.setdefault(one.context.request_id, []).append(proposal)

    with observing(engine, record):
        yield recorded


class Judge(ABC):
    """Compares recorded proposals with its own."""

    target_ids: Tensor
    target: TargetReference

    @abstractmethod
    def judge(self, proposals: Sequence[Proposal]) -> list[bool]:
        """Asserts that one request's proposals are right; False where they part at a near-tie."""

    def judge_all(self, recorded: Recording) -> list[bool]:
        """``judge`` for every request."""
        return [verdict for proposals in recorded.values() for verdict in self.judge(proposals)]

    def same(self, proposal: Proposal, logits: Sequence[Tensor]) -> bool:
        """Compares up to the first near-tie; ``logits`` are [N], one for each draft."""
        for i, (token, scores) in enumerate(zip(proposal.drafts, logits, strict=True)):
            best = int(self.target_ids[scores.argmax()])
            if token != best:
                ours = scores[self.target_ids == token]
                gap = float(scores.max() - ours) if len(ours) else float("inf")
                assert gap < self.target.tie_gap(scores.max()), (
                    f"draft {i} after {len(proposal.token_ids)} tokens is {token}, the reference"
                    f" says {best}, which is better by {gap:.2e}"
                )
                return False
        return True


class EagleJudge(Judge, EagleReference):
    """Runs the draft step by step, each step on its own proposals."""

    def __init__(self, draft_folder: Path, target: TargetReference) -> None:
        EagleReference.__init__(self, draft_folder, target)
        self._logits: list[Tensor] = []

    def _rows(
        self, next_ids: Sequence[int], features: Tensor, cache: DynamicCache
    ) -> tuple[int, Tensor]:
        token, output = super()._rows(next_ids, features, cache)
        self._logits.append(self.logits(output)[0])  # [N]
        return token, output

    def judge(self, proposals: Sequence[Proposal]) -> list[bool]:
        _, features = self.read(proposals[-1].token_ids[:-1], self.target.new_cache())
        draft_cache = DynamicCache(config=self.config)
        verdicts = []
        for proposal in proposals:
            ids = proposal.token_ids
            self._logits.clear()
            rows = features[draft_cache.get_seq_length() : len(ids) - 1]
            self._propose_on(draft_cache, ids, rows, len(proposal.drafts))
            verdicts.append(self.same(proposal, self._logits))
        return verdicts


class MtpJudge(EagleJudge, MtpReference):
    """As an EAGLE draft; the layer is the target's own."""

    def __init__(self, folder: Path, target: TargetReference) -> None:
        MtpReference.__init__(self, folder, target)
        self._logits = []


class Eagle3Judge(EagleJudge, Eagle3Reference):
    """As an EAGLE draft, with another layer over other features."""

    def __init__(self, draft_folder: Path, target: TargetReference) -> None:
        Eagle3Reference.__init__(self, draft_folder, target)
        self._logits = []


class DFlashJudge(Judge, DFlashReference):
    """Fills the blocks of all steps from one pass of the target."""

    def __init__(self, draft_folder: Path, target: TargetReference) -> None:
        DFlashReference.__init__(self, draft_folder, target)

    def judge(self, proposals: Sequence[Proposal]) -> list[bool]:
        context = self.context(self.taps(proposals[-1].token_ids[:-1]))
        return [
            self.same(step, list(self._slots(step, context)[: len(step.drafts)]))
            for step in proposals
        ]

    def _slots(self, step: Proposal, context: Tensor) -> Tensor:
        return self.logits(step.token_ids[-1], context[: len(step.token_ids) - 1])


JUDGES: dict[Method, type[EagleJudge] | type[DFlashJudge]] = {
    "dflash": DFlashJudge,
    "eagle": EagleJudge,
    "eagle3": Eagle3Judge,
    "mtp": MtpJudge,
}
