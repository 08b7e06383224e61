"""The graph's proposals are those of an independent EAGLE draft, step by step.

Lossless answers would hide a wrong draft: it costs speed only.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from max.pipelines.context import TextGenerationOutput
from max.pipelines.modeling.types import TextGenerationInputs
from max.pipelines.request import RequestID
from prompts import random_prompt, real_prompts
from reference.eagle import EagleReference, mean_acceptance_length
from reference.target import TIE_GAP, TargetReference
from runs import answers, greedy_requests, proposing
from tiny import TinyPair
from torch import Tensor
from transformers import DynamicCache

from unispec.checkpoints.demo import demo_draft_folder
from unispec.pipelines.runtime import Engine

PAGE = 128
LENGTHS = (1, 2, 63, 64, 65, 127, 128, 129, 200, 257, 300)
"""Of the random prompts: up to five chunks of 64 tokens, up to three pages."""


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
    pipeline: Any = engine.pipeline
    execute = pipeline.execute
    recorded: Recording = {}

    def execute_and_record(inputs: TextGenerationInputs[Any]) -> dict[Any, TextGenerationOutput]:
        outputs: dict[Any, TextGenerationOutput] = execute(inputs)
        for context in inputs.flat_batch:
            row = pipeline.model.batch.row(context)
            if row.drafts and not context.is_done:
                proposal = Proposal(context.tokens.all.tolist(), list(row.drafts))
                recorded.setdefault(context.request_id, []).append(proposal)
        return outputs

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pipeline, "execute", execute_and_record)
        yield recorded


class Judge(EagleReference):
    """Compares recorded proposals with its own."""

    def __init__(self, draft_folder: Path, target: TargetReference) -> None:
        super().__init__(draft_folder, target)
        self._logits: list[Tensor] = []

    def _rows(
        self, next_ids: Sequence[int], features: Tensor, cache: DynamicCache
    ) -> tuple[int, Tensor]:
        token, output = super()._rows(next_ids, features, cache)
        self._logits.append((output @ self.head.T)[0])  # [N]
        return token, output

    def judge(self, proposals: Sequence[Proposal]) -> list[bool]:
        """Asserts that one request's proposals are right; False where they part at a near-tie."""
        features = self.target.extend(proposals[-1].token_ids[:-1], self.target.new_cache())
        cache = DynamicCache(config=self.config)
        verdicts = []
        for proposal in proposals:
            ids = proposal.token_ids
            self._logits.clear()
            rows = features[cache.get_seq_length() : len(ids) - 1]
            theirs = self._propose_on(cache, ids, rows, len(proposal.drafts))
            verdicts.append(self._same(proposal, theirs))
        return verdicts

    def _same(self, ours: Proposal, theirs: Sequence[int]) -> bool:
        for i, (our_token, their_token) in enumerate(zip(ours.drafts, theirs, strict=True)):
            if our_token != their_token:
                logit = self._logits[i][self.target_ids == our_token]
                gap = float(self._logits[i].max() - logit) if len(logit) else float("inf")
                assert gap < TIE_GAP, (
                    f"draft {i} after {len(ours.token_ids)} tokens is {our_token}, the reference"
                    f" says {their_token}, which is better by {gap:.2e}"
                )
                return False
        return True

    def judge_all(self, recorded: Recording) -> list[bool]:
        """``judge`` for every request."""
        return [verdict for proposals in recorded.values() for verdict in self.judge(proposals)]


@pytest.fixture(scope="module")
def demo_judge(demo_reference: EagleReference) -> Judge:
    return Judge(demo_draft_folder(), demo_reference.target)


@pytest.fixture(scope="module")
def tiny_judge(
    tiny_pair: Callable[[str], TinyPair], tiny_reference: Callable[[str], EagleReference]
) -> Callable[[str], Judge]:
    judges: dict[str, Judge] = {}

    def judge(name: str) -> Judge:
        if name not in judges:
            judges[name] = Judge(tiny_pair(name).draft, tiny_reference(name).target)
        return judges[name]

    return judge


@pytest.mark.parametrize("k", [3, 5])
def test_demo_draft_on_real_text(demo_engine: Engine, demo_judge: Judge, k: int) -> None:
    requests = greedy_requests(real_prompts(demo_engine.tokenizer), 24)
    with proposing(demo_engine, k), recording(demo_engine) as recorded:
        answers(demo_engine, requests)
    assert {len(step.drafts) for steps in recorded.values() for step in steps} == {k}
    verdicts = demo_judge.judge_all(recorded)
    assert len(verdicts) >= 200
    assert sum(verdicts) >= 0.99 * len(verdicts)


def test_demo_draft_is_accepted_as_often_as_the_reference(
    demo_engine: Engine, demo_reference: EagleReference
) -> None:
    k = 3
    prompts = real_prompts(demo_engine.tokenizer)[:8]
    with proposing(demo_engine, k):
        report = demo_engine.generate(greedy_requests(prompts, 48))
    steps = [
        step
        for prompt, result in zip(prompts, report.results, strict=True)
        for step in demo_reference.simulate(
            prompt, result.drafted // k, k, demo_engine.eos_token_ids
        )
    ]
    assert len(steps) >= 150
    assert report.mean_acceptance_length == pytest.approx(mean_acceptance_length(steps), rel=0.02)


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("k", [3, 5])
@pytest.mark.parametrize("name", "ABCD")
def test_tiny_draft_after_prefill_in_chunks(
    tiny_engine: Callable[[str], Engine], tiny_judge: Callable[[str], Judge], name: str, k: int
) -> None:
    engine, judge = tiny_engine(name), tiny_judge(name)
    prompts = [random_prompt(len(judge.target.embedding), length, seed=k) for length in LENGTHS]
    with proposing(engine, k), recording(engine) as recorded:
        answers(engine, greedy_requests(prompts, 16, ignore_eos=True))
    assert sorted(len(steps[0].token_ids) - 1 for steps in recorded.values()) == sorted(LENGTHS)
    verdicts = judge.judge_all(recorded)
    assert len(verdicts) >= 50
    assert sum(verdicts) >= 0.99 * len(verdicts)


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("name", "ABCD")
def test_tiny_draft_after_a_prefix_from_the_cache(
    tiny_engine: Callable[[str], Engine], tiny_judge: Callable[[str], Judge], name: str
) -> None:
    engine, judge = tiny_engine(name), tiny_judge(name)
    vocab_size = len(judge.target.embedding)
    first = random_prompt(vocab_size, 300, seed=1)
    other = [3 + (token + 1 - 3) % (vocab_size - 3) for token in first]
    (answer,) = answers(engine, greedy_requests([first], 100, ignore_eos=True))
    manager = engine.pipeline.kv_manager
    # Row i of the draft reads token i + 1: a page counts as known with the token after it.
    for prompt, known_pages in [
        (first, 2),
        (first[: 2 * PAGE] + other[2 * PAGE :], 1),
        (first[: 2 * PAGE + 1] + other[2 * PAGE + 1 :], 2),
        (first[:PAGE] + other[PAGE:], 0),
        (first[: PAGE + 1] + other[PAGE + 1 :], 1),
        ([*first, *answer, *other[:9]], 3),
    ]:
        manager.take_metrics_aggregated()
        with recording(engine) as recorded:
            engine.generate(greedy_requests([prompt], 12, ignore_eos=True))
        assert manager.take_metrics_aggregated().cache_tokens == known_pages * PAGE
        assert all(judge.judge_all(recorded))


@torch.inference_mode()
def test_judge_sees_a_wrong_proposal(
    tiny_judge: Callable[[str], Judge],
) -> None:
    judge = tiny_judge("C")
    prompt = random_prompt(len(judge.target.embedding), 40, seed=1)
    (step,) = judge.simulate(prompt, 1, 3)
    ids = [*prompt, step.next_token]
    assert judge.judge([Proposal(ids, step.proposals)]) == [True]
    for wrong in (step.proposals[0], 1):
        with pytest.raises(AssertionError, match="the reference says"):
            judge.judge([Proposal(ids, [*step.proposals[:2], wrong])])
