"""Sampled answers follow the target's own law, whatever the draft proposes.

With argmax drafts more holds: the answer to a seed is the target's own, token by token.
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
from reference.dflash import DFlashReference
from reference.distribution import target_distribution
from reference.eagle import EagleReference
from reference.target import TargetReference
from tiny import TinyPair

from unispec.engine import Engine, Report, Request

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


PAIRS = [
    pytest.param("llama_eagle_agreeing", id="eagle-argmax"),
    pytest.param("llama_eagle_biased", id="eagle-sampled"),
    pytest.param("llama_dflash_agreeing", id="dflash-sampled"),
]
"""The sampled drafts have a reduced vocabulary."""


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


def law_of(name: str, pair: TinyPair, target: TargetReference, law_name: str) -> dict[str, Any]:
    """A law that a random draft can meet: it favours what that draft proposes most."""
    law = LAWS[law_name]
    proposals: list[list[int]] = []
    if name == "llama_eagle_biased" and pair.draft is not None:
        steps = EagleReference(pair.draft, target).simulate(PROMPT, 40, 3)
        proposals = [step.proposals for step in steps]
    if name == "llama_dflash_windowed" and pair.draft is not None:
        draft = DFlashReference(pair.draft, target)
        proposals = [draft.propose([*PROMPT, token], LENGTH - 1) for token in range(256)]
    proposed = Counter(token for tokens in proposals for token in tokens)
    if proposed:
        law = law | {"logit_bias": {token: 12.0 for token, _ in proposed.most_common(6)}}
    return law


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("law_name", LAWS)
@pytest.mark.parametrize(
    "name", [*PAIRS, pytest.param("llama_dflash_windowed", id="dflash-argmax")]
)
def test_answers_follow_the_targets_law(
    tiny_pair: Callable[[str], TinyPair],
    tiny_engine: Callable[[str], Engine],
    tiny_target: Callable[[str], TargetReference],
    name: str,
    law_name: str,
) -> None:
    """Chi-square of whole answers against products of exact probabilities."""
    target = tiny_target(name)
    law = law_of(name, tiny_pair(name), target, law_name)
    exact = exact_law(target, law)
    assert len(exact) > 20
    report = ask(
        tiny_engine(name), [PROMPT] * ANSWERS, range(ANSWERS), max_new_tokens=LENGTH, **law
    )
    counts = Counter(tuple(result.token_ids) for result in report.results)
    assert counts.keys() <= exact.keys()
    p_value = chi_square_p_value([counts[answer] for answer in exact], list(exact.values()))
    assert p_value > SIGNIFICANCE
    drafted = sum(result.drafted for result in report.results)
    accepted = sum(result.accepted for result in report.results)
    assert 50 < accepted < drafted - 50  # both branches of the rule were taken, often


@pytest.mark.usefixtures("one_thread")
def test_a_wrong_law_is_seen(
    eagle_engine: Engine, tiny_target: Callable[[str], TargetReference]
) -> None:
    """The test above has power: a temperature off by a fifth is refused."""
    law = LAWS["top_k"]
    wrong = exact_law(tiny_target("llama_eagle_agreeing"), {**law, "temperature": 1.6})
    report = ask(eagle_engine, [PROMPT] * ANSWERS, range(ANSWERS), max_new_tokens=LENGTH, **law)
    counts = Counter(tuple(result.token_ids) for result in report.results)
    p_value = chi_square_p_value([counts[answer] for answer in wrong], list(wrong.values()))
    assert p_value < SIGNIFICANCE


@pytest.mark.parametrize("name", PAIRS)
def test_other_rows_change_nothing(tiny_engine: Callable[[str], Engine], name: str) -> None:
    """A seed's answer is the same alone and in a full batch, whatever is in the other rows."""
    engine = tiny_engine(name)
    prompts = [random_prompt(256, length, seed=2) for length in (5, 40, 70, 129, 9, 33, 64, 128)]
    law = {"temperature": 1.2, "top_p": 0.9, "max_new_tokens": 24}
    seeds = range(100, 108)
    together = ask(engine, prompts, seeds, **law).results
    for prompt, seed, result in zip(prompts, seeds, together, strict=True):
        engine.reset_prefix_cache()
        assert ask(engine, [prompt], [seed], **law).results == [result]


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
