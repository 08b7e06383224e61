"""Sampled answers follow the target's own law, whatever the draft proposes.

With argmax drafts more holds: the answer to a seed is the target's own, token by token.
All pairs here have the target of pair D.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import pytest
from max.pipelines.context import SamplingParams
from prompts import random_prompt
from reference.chi_square import chi_square_p_value
from reference.distribution import target_distribution
from reference.target import TargetReference

from unispec.pipelines.runtime import Engine, Report, Request

PROMPT = random_prompt(256, 5, seed=1)
LENGTH = 3
"""The first token is not drafted, the others are."""
ANSWERS = 3000
SIGNIFICANCE = 1e-3

LAWS: Mapping[str, dict[str, Any]] = {
    "top_k": {"temperature": 2.0, "top_k": 4},
    "everything": {
        "temperature": 2.0,
        "top_k": 4,
        "top_p": 0.95,
        "min_p": 0.02,
        "presence_penalty": 0.5,
        "frequency_penalty": 0.75,
        "repetition_penalty": 1.5,
        "logit_bias": {PROMPT[0]: 3.0, PROMPT[1]: 2.0},
    },
}


@pytest.fixture(params=["eagle-argmax", "eagle-sampled", "dflash-sampled"])
def drafting_engine(
    request: pytest.FixtureRequest,
    tiny_engine: Callable[[str], Engine],
    sampled_draft_engine: Engine,
) -> Engine:
    """Drafts of each kind; the last one's vocabulary is reduced."""
    engines = {
        "eagle-argmax": tiny_engine("D"),
        "eagle-sampled": sampled_draft_engine,
        "dflash-sampled": tiny_engine("F"),
    }
    return engines[request.param]


def ask(
    engine: Engine, prompts: Sequence[Sequence[int]], seeds: Sequence[int], **law: Any
) -> Report:
    """One request a prompt and seed."""
    bias = law.pop("logit_bias", {})
    sampling = partial(SamplingParams, ignore_eos=True, **law)
    return engine.generate(
        [
            Request(token_ids=prompt, sampling=sampling(seed=seed), logit_bias=bias)
            for prompt, seed in zip(prompts, seeds, strict=True)
        ]
    )


def exact_law(target: TargetReference, law: Mapping[str, Any]) -> dict[tuple[int, ...], float]:
    """The probability of every answer of `LENGTH` tokens that can occur."""
    answers = {(): 1.0}
    for _ in range(LENGTH):
        longer = {}
        for answer, mass in answers.items():
            logits = target.features_and_logits([*PROMPT, *answer])[1][-1]
            probs = target_distribution(
                logits.double().numpy(), prompt_ids=PROMPT, generated_ids=answer, **law
            )
            for token in probs.nonzero()[0].tolist():
                longer[(*answer, token)] = mass * float(probs[token])
        answers = longer
    return answers


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("law", LAWS)
def test_answers_follow_the_targets_law(
    drafting_engine: Engine,
    tiny_target: Callable[[str], TargetReference],
    law: str,
) -> None:
    """Chi-square of whole answers against products of exact probabilities."""
    exact = exact_law(tiny_target("D"), LAWS[law])
    assert len(exact) > 20
    report = ask(
        drafting_engine,
        [PROMPT] * ANSWERS,
        range(ANSWERS),
        max_new_tokens=LENGTH,
        **LAWS[law],
    )
    counts = Counter(tuple(result.token_ids) for result in report.results)
    assert counts.keys() <= exact.keys()
    p_value = chi_square_p_value([counts[answer] for answer in exact], list(exact.values()))
    assert p_value > SIGNIFICANCE
    drafted = sum(result.drafted for result in report.results)
    accepted = sum(result.accepted for result in report.results)
    assert 0.02 < accepted / drafted < 0.98  # both branches of the rule were taken, often


@pytest.mark.usefixtures("one_thread")
def test_a_wrong_law_is_seen(
    eagle_engine: Engine, tiny_target: Callable[[str], TargetReference]
) -> None:
    """The test above has power: a temperature off by a fifth is refused."""
    law = LAWS["top_k"]
    wrong = exact_law(tiny_target("D"), {**law, "temperature": 1.6})
    report = ask(eagle_engine, [PROMPT] * ANSWERS, range(ANSWERS), max_new_tokens=LENGTH, **law)
    counts = Counter(tuple(result.token_ids) for result in report.results)
    p_value = chi_square_p_value([counts[answer] for answer in wrong], list(wrong.values()))
    assert p_value < SIGNIFICANCE


def test_other_rows_change_nothing(drafting_engine: Engine) -> None:
    """A seed's answer is the same alone and in a full batch, whatever is in the other rows."""
    prompts = [random_prompt(256, length, seed=2) for length in (5, 40, 70, 129, 9, 33, 64, 128)]
    law = {"temperature": 1.2, "top_p": 0.9, "max_new_tokens": 24}
    seeds = range(100, 108)
    together = ask(drafting_engine, prompts, seeds, **law).results
    for prompt, seed, result in zip(prompts, seeds, together, strict=True):
        drafting_engine.pipeline.kv_manager.reset_prefix_cache()
        assert ask(drafting_engine, [prompt], [seed], **law).results == [result]


@pytest.mark.parametrize("law", LAWS)
def test_an_argmax_draft_changes_no_sampled_answer(
    eagle_engine: Engine, target_only_engine: Engine, law: str
) -> None:
    prompts = [random_prompt(256, length, seed=3) for length in (1, 5, 40, 70, 129, 300)]
    seeds = range(200, 206)
    drafted = ask(eagle_engine, prompts, seeds, max_new_tokens=24, **LAWS[law]).results
    alone = ask(target_only_engine, prompts, seeds, max_new_tokens=24, **LAWS[law]).results
    assert [result.token_ids for result in drafted] == [result.token_ids for result in alone]
    assert sum(result.accepted for result in drafted) > 0


def test_a_sampled_draft_changes_no_greedy_answer(
    eagle_engine: Engine, sampled_draft_engine: Engine
) -> None:
    """At temperature 0 its distribution is one token, and so is the target's."""
    prompts = [random_prompt(256, length, seed=4) for length in (1, 5, 40, 70, 129, 300)]
    law = {"temperature": 0, "max_new_tokens": 24}
    theirs = ask(eagle_engine, prompts, range(6), **law)
    ours = ask(sampled_draft_engine, prompts, range(6), **law)
    assert [result.token_ids for result in ours.results] == [
        result.token_ids for result in theirs.results
    ]
    assert ours.mean_acceptance_length == pytest.approx(theirs.mean_acceptance_length)
    assert ours.mean_acceptance_length > 2
