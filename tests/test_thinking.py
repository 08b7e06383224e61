"""Relaxed acceptance: drafts near the top stand inside thinking blocks, and only there."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import pytest
from prompts import random_prompt
from reference.target import TargetReference
from runs import answers, greedy_requests, observing
from test_mtp_inputs import PROMPT, VOCAB, stepping
from tiny import NEAR_DELTA, NEAR_TOP_N

from unispec.engine import Engine, Step
from unispec.pipelines.runtime.thinking import ThinkingTokens

NAMES = pytest.mark.parametrize("name", ["deepseek_mtp_agreeing"])


@pytest.mark.parametrize(
    ("tokens", "before", "after"),
    [
        ([], False, False),
        ([], True, True),
        ([5, 6], False, False),
        ([1, 5], False, True),
        ([1, 5, 2], False, False),
        ([2, 5, 1], False, True),
        ([5, 2], True, False),
        ([1, 1, 2], False, False),
    ],
)
def test_the_last_thinking_token_counts(tokens: list[int], before: bool, after: bool) -> None:
    assert ThinkingTokens(start=1, end=2).inside(tokens, before) is after


def test_a_block_ends_with_its_last_token() -> None:
    thinking = ThinkingTokens(start=1, end=2)
    assert thinking.up_to_end([5, 2, 6, 2]) == [5, 2]
    assert thinking.up_to_end([5, 1, 6]) == [5, 1, 6]


@NAMES
@pytest.mark.parametrize(
    ("written", "stand"),
    [
        pytest.param(2, NEAR_TOP_N, id="as many as may"),
        pytest.param(4, NEAR_TOP_N - 1, id="as near as they may be"),
    ],
)
def test_a_draft_near_the_top_stands_inside_a_thinking_block(
    tiny_engine: Callable[[str], Engine],
    tiny_target: Callable[[str], TargetReference],
    name: str,
    written: int,
    stand: int,
) -> None:
    target = tiny_target(name)
    with stepping(tiny_engine(name), [*PROMPT, *target.greedy(PROMPT, written).token_ids]) as step:
        _, logits = target.features_and_logits(step.begin())
        p = logits[-1].softmax(-1)  # [V]
        ranked = p.argsort(descending=True).tolist()
        near = [token for token in ranked[:NEAR_TOP_N] if p[token] >= p.max() - NEAR_DELTA]
        assert len(near) == stand
        step.context.in_reasoning_phase = True
        stands = [token for token in range(VOCAB) if step.verify(token, -1)[0] == 1]
        assert sorted(stands) == sorted(near)
        step.context.in_reasoning_phase = False
        assert [token for token in near if step.verify(token, -1)[0] == 1] == ranked[:1]


@NAMES
def test_thinking_blocks_are_followed_and_only_there_text_may_differ(
    tiny_engine: Callable[[str], Engine],
    tiny_target: Callable[[str], TargetReference],
    monkeypatch: pytest.MonkeyPatch,
    name: str,
) -> None:
    """Tokens that the model often writes open and close blocks; a prompt opens some too."""
    engine, target = tiny_engine(name), tiny_target(name)
    prompts = [random_prompt(VOCAB, length, seed=7) for length in range(5, 13)]
    requests = greedy_requests(prompts, 60, ignore_eos=True)
    strict = answers(engine, requests)
    (start, _), (end, _) = Counter(token for answer in strict for token in answer).most_common(2)
    prompts[0][-3:] = [start, 4, 5]
    prompts[1][-3:] = [start, end, 5]
    thinking = ThinkingTokens(start, end)
    monkeypatch.setattr(engine.pipeline, "thinking", thinking)
    told: list[tuple[list[int], bool]] = []
    ends: list[int] = []

    def tell(step: Step) -> None:
        for one in step.rows:
            thinks, drafts = one.context.in_reasoning_phase, one.row.drafts
            told.append((one.context.tokens.all.tolist(), thinks))
            if thinks and end in drafts:
                ends.append(drafts.index(end) + 1 - len(drafts))

    with observing(engine, tell):
        relaxed = answers(engine, greedy_requests(prompts, 60, ignore_eos=True))

    def inside(tokens: list[int]) -> bool:
        opened = max((i for i, token in enumerate(tokens) if token == start), default=-1)
        return opened > max((i for i, token in enumerate(tokens) if token == end), default=-1)

    assert [phase for _, phase in told] == [inside(tokens) for tokens, _ in told]
    assert len({phase for _, phase in told}) == 2
    assert set(ends) == {0}  # no draft is behind the one that ends a block
    swaps = 0
    for prompt, answer in zip(prompts, relaxed, strict=True):
        _, logits = target.features_and_logits(prompt + answer)
        for place, token in enumerate(answer, start=len(prompt)):
            p = logits[place - 1].softmax(-1)
            if p.max() - p[token] < 1e-4:
                continue
            swaps += 1
            assert inside([*prompt, *answer][:place])
            assert int((p > p[token] + 1e-6).sum()) < NEAR_TOP_N
            assert p[token] >= p.max() - NEAR_DELTA - 1e-6
    assert swaps > 0
