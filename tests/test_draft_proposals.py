"""The graph's proposals are those of an independent draft in torch, step by step.

Lossless answers would hide a wrong draft: it costs speed only.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from draft_judges import JUDGES, DFlashJudge, EagleJudge, Judge, Proposal, recording
from max import tree
from max.driver import Buffer
from max.nn.kv_cache import KVCacheInputsPerDevice
from max.pipelines.context import TextContext
from prompts import random_prompt, real_prompts
from reference.eagle import mean_acceptance_length
from reference.target import TargetReference, assert_same_greedy
from runs import answers, greedy_requests, proposing, scheduled
from tiny import COMPILED_PAIRS, RELATIVE_PAIRS, TinyPair

from unispec.checkpoints.demo import DEMO_METHODS, demo_draft_folder
from unispec.engine import Engine
from unispec.methods import Method
from unispec.pipelines.runtime.draft_probs import DraftProbs
from unispec.pipelines.runtime.outputs import StepModelOutputs

PAGE = 128
LENGTHS = (1, 2, 63, 64, 65, 127, 128, 129, 200, 257, 300)
"""Of the random prompts: up to five chunks of 64 tokens, up to three pages."""

KNOWN_PAGES: dict[Method, tuple[int, ...]] = {
    # Row i of these drafts reads token i + 1: a page is known with the token after it only.
    "eagle": (2, 1, 2, 0, 1, 3),
    "eagle3": (2, 1, 2, 0, 1, 3),
    "mtp": (2, 1, 2, 0, 1, 3),
    "dflash": (2, 2, 2, 1, 1, 3),
}
"""Of the six prompts that share less or more with those before them."""


SKIPPED_LENGTHS = ((1, 9), (64, 120), (129, 90))
"""Of the prompts of two rows."""

SKIPPING = (4, 0, 0, 2, 0, 1, 0, 0, 0, 3, 5, 0)
"""Tokens that one step after the other proposes: none for a while, verified drafts among that."""


@pytest.fixture(scope="module")
def demo_judge(demo_target: TargetReference) -> Callable[[Method], EagleJudge | DFlashJudge]:
    return cache(lambda method: JUDGES[method](demo_draft_folder(method), demo_target))


@pytest.fixture(scope="module")
def tiny_judge(
    tiny_pair: Callable[[str], TinyPair], tiny_target: Callable[[str], TargetReference]
) -> Callable[[str], EagleJudge | DFlashJudge]:
    @cache
    def judge(name: str) -> EagleJudge | DFlashJudge:
        pair = tiny_pair(name)
        return JUDGES[pair.method](pair.draft or pair.target, tiny_target(name))

    return judge


@pytest.mark.parametrize("k", [3, 5])
@pytest.mark.parametrize("method", DEMO_METHODS)
def test_demo_draft_on_real_text(
    demo_engines: Callable[[Method], Engine],
    demo_judge: Callable[[Method], Judge],
    method: Method,
    k: int,
) -> None:
    engine = demo_engines(method)
    half = real_prompts(engine.tokenizer)[k == 5 :: 2]
    requests = greedy_requests(half, 48)
    with proposing(engine, k), recording(engine) as recorded:
        answers(engine, requests)
    assert {len(step.drafts) for steps in recorded.values() for step in steps} == {k}
    verdicts = demo_judge(method).judge_all(recorded)
    assert len(verdicts) >= 200
    assert sum(verdicts) >= 0.99 * len(verdicts)


@pytest.mark.parametrize("method", DEMO_METHODS)
def test_demo_draft_is_accepted_as_often_as_the_reference(
    demo_engines: Callable[[Method], Engine],
    demo_judge: Callable[[Method], EagleJudge | DFlashJudge],
    method: Method,
) -> None:
    k, engine = 3, demo_engines(method)
    prompts = real_prompts(engine.tokenizer)[:7]
    with proposing(engine, k):
        report = engine.generate(greedy_requests(prompts, 40))
    steps = [
        step
        for prompt, result in zip(prompts, report.results, strict=True)
        for step in demo_judge(method).simulate(
            prompt, result.drafted // k, k, engine.eos_token_ids
        )
    ]
    assert len(steps) >= 120
    assert report.mean_acceptance_length == pytest.approx(mean_acceptance_length(steps), rel=0.02)


@pytest.mark.parametrize("method", DEMO_METHODS)
def test_demo_draft_after_a_prefix_from_the_cache(
    demo_engines: Callable[[Method], Engine], method: Method
) -> None:
    """Real drafts, which look at their context, propose after a warm prefix as after a cold one."""
    engine = demo_engines(method)
    long = [prompt for prompt in real_prompts(engine.tokenizer) if len(prompt) > PAGE + 1]
    assert len(long) >= 2
    engine.reset_prefix_cache()
    cold = engine.generate(greedy_requests(long, 24))
    engine.pipeline.kv_manager.take_metrics_aggregated()
    warm = engine.generate(greedy_requests(long, 24))
    assert engine.pipeline.kv_manager.take_metrics_aggregated().cache_tokens >= PAGE * len(long)
    assert [r.token_ids for r in warm.results] == [r.token_ids for r in cold.results]
    assert warm.mean_acceptance_length == pytest.approx(cold.mean_acceptance_length, rel=0.01)


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("k", [1, 2, 3, 5, 8])
@pytest.mark.parametrize("name", [*COMPILED_PAIRS, *RELATIVE_PAIRS, "llama_dflash_both_ways"])
def test_tiny_draft_after_prefill_in_chunks(
    tiny_engine: Callable[[str], Engine], tiny_judge: Callable[[str], Judge], name: str, k: int
) -> None:
    engine, judge = tiny_engine(name), tiny_judge(name)
    prompts = [random_prompt(len(judge.target.embedding), length, seed=k) for length in LENGTHS]
    with proposing(engine, min(k, engine.max_speculative_tokens)), recording(engine) as recorded:
        answers(engine, greedy_requests(prompts, 16, ignore_eos=True))
    assert sorted(len(steps[0].token_ids) - 1 for steps in recorded.values()) == sorted(LENGTHS)
    verdicts = judge.judge_all(recorded)
    assert len(verdicts) >= 50
    assert sum(verdicts) >= 0.99 * len(verdicts)


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("name", COMPILED_PAIRS)
def test_tiny_draft_after_a_prefix_from_the_cache(
    tiny_pair: Callable[[str], TinyPair],
    tiny_engine: Callable[[str], Engine],
    tiny_judge: Callable[[str], Judge],
    name: str,
) -> None:
    engine, judge = tiny_engine(name), tiny_judge(name)
    vocab_size = len(judge.target.embedding)
    first = random_prompt(vocab_size, 300, seed=1)
    other = [3 + (token + 1 - 3) % (vocab_size - 3) for token in first]
    (answer,) = answers(engine, greedy_requests([first], 100, ignore_eos=True))
    manager = engine.pipeline.kv_manager
    prompts = [
        first,
        first[: 2 * PAGE] + other[2 * PAGE :],
        first[: 2 * PAGE + 1] + other[2 * PAGE + 1 :],
        first[:PAGE] + other[PAGE:],
        first[: PAGE + 1] + other[PAGE + 1 :],
        [*first, *answer, *other[:9]],
    ]
    for prompt, pages in zip(prompts, KNOWN_PAGES[tiny_pair(name).method], strict=True):
        manager.take_metrics_aggregated()
        with recording(engine) as recorded:
            engine.generate(greedy_requests([prompt], 12, ignore_eos=True))
        assert manager.take_metrics_aggregated().cache_tokens == pages * PAGE
        assert all(judge.judge_all(recorded))


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("name", COMPILED_PAIRS)
def test_tiny_draft_after_steps_without_it(
    tiny_engine: Callable[[str], Engine],
    tiny_judge: Callable[[str], Judge],
    tiny_target: Callable[[str], TargetReference],
    name: str,
) -> None:
    """Two rows: one verifies what was proposed, the other two drafts that are right, each step."""
    engine, judge, target = tiny_engine(name), tiny_judge(name), tiny_target(name)
    vocab_size = len(judge.target.embedding)
    verdicts = []
    for lengths in SKIPPED_LENGTHS:
        pair = [random_prompt(vocab_size, length, seed=3) for length in lengths]
        right = target.greedy(pair[1], 44, set()).token_ids

        def know(
            contexts: Sequence[TextContext], second: list[int] = pair[1], right: list[int] = right
        ) -> None:
            for context in contexts:
                row = engine.pipeline.model.batch.row(context)
                if row.generated and context.tokens.prompt.tolist() == second:
                    row.drafts = list(right[row.generated :][:2])
                    probs = np.eye(vocab_size, dtype=np.float32)[[row.drafts]]
                    row.draft_probs = DraftProbs(Buffer.from_numpy(probs), 0)

        requests = greedy_requests(pair, 40, ignore_eos=True)
        # The first step reads a prompt and proposes nothing.
        counts = (0, *SKIPPING)
        with scheduled(engine, counts, know) as steps, recording(engine) as recorded:
            found = answers(engine, requests)
        assert any(any(step.drafts) and not step.wanted for step in steps)
        assert any(len(set(step.deferred)) == 2 and step.wanted for step in steps)
        assert max(max(step.deferred) for step in steps) >= 6
        verdicts += judge.judge_all(recorded)
        for prompt, answer in zip(pair, found, strict=True):
            assert_same_greedy(answer, target.greedy(prompt, 40, set(), guess=answer))
    assert len(verdicts) >= 30
    assert sum(verdicts) >= 0.99 * len(verdicts)


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("name", COMPILED_PAIRS)
def test_tiny_draft_after_a_page_that_was_filled_without_it(
    tiny_engine: Callable[[str], Engine], tiny_judge: Callable[[str], Judge], name: str
) -> None:
    """The page is shared with a later prompt, and what the draft made of it is in it."""
    engine, judge = tiny_engine(name), tiny_judge(name)
    first = random_prompt(len(judge.target.embedding), PAGE - 28, seed=5)
    with scheduled(engine, [0]) as steps:
        (answer,) = answers(engine, greedy_requests([first], 60, ignore_eos=True))
    assert max(max(step.deferred) for step in steps) >= 20
    manager = engine.pipeline.kv_manager
    manager.take_metrics_aggregated()
    with recording(engine) as recorded:
        engine.generate(greedy_requests([[*first, *answer]], 12, ignore_eos=True))
    assert manager.take_metrics_aggregated().cache_tokens == PAGE
    assert all(judge.judge_all(recorded))


@pytest.mark.parametrize("name", COMPILED_PAIRS)
def test_a_step_without_proposals_leaves_the_draft_s_cache(
    tiny_engine: Callable[[str], Engine], monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    engine = tiny_engine(name)
    engine.load()
    model, changed = engine.pipeline.model, []
    execute = model.execute

    def watched(inputs: Any) -> StepModelOutputs:
        (draft,) = tree.leaves(inputs.kv_cache_inputs["draft"], leaf=KVCacheInputsPerDevice)
        before = draft.kv_blocks.to_numpy().tobytes()
        outputs = execute(inputs)
        proposed = outputs.next_draft_tokens.shape[1]
        changed.append((proposed > 0, draft.kv_blocks.to_numpy().tobytes() != before))
        return outputs

    monkeypatch.setattr(model, "execute", watched)
    with scheduled(engine, SKIPPING):
        answers(engine, greedy_requests([[5], [7, 8, 9]], 30, ignore_eos=True))
    assert changed.count((False, False)) >= 6
    assert changed.count((True, True)) >= 6
    assert all(proposed == written for proposed, written in changed)


@torch.inference_mode()
@pytest.mark.parametrize("name", ["llama_eagle_bfloat16", "llama_dflash_windowed"])
def test_judge_sees_a_wrong_proposal(
    tiny_judge: Callable[[str], EagleJudge | DFlashJudge], name: str
) -> None:
    judge = tiny_judge(name)
    prompt = random_prompt(len(judge.target.embedding), 40, seed=1)
    (step,) = judge.simulate(prompt, 1, 3)
    ids = [*prompt, step.next_token]
    assert judge.judge([Proposal(ids, step.proposals)]) == [True]
    for wrong in (step.proposals[0], 1):
        with pytest.raises(AssertionError, match="the reference says"):
            judge.judge([Proposal(ids, [*step.proposals[:2], wrong])])
