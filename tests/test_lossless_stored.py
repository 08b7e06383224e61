"""Answers of a target in any form of weights are the same with a draft and without it.

No near-tie is allowed between the two: every operation of a step computes a row in the same way
whatever other rows are beside it.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
from prompts import random_prompt
from reference.target import TargetReference, assert_same_greedy
from runs import answers, greedy_requests, proposing
from stored_llama import stored_llama
from tiny.eagle import agreeing_eagle

from unispec.engine import Engine, EngineConfig

pytestmark = pytest.mark.compiles("stored_forms")

NEW_TOKENS = 48
PROMPTS = [random_prompt(262, length, seed=1) for length in (1, 5, 63, 64, 65, 127, 128, 130)]


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    """The GGUF file, the same numbers in float32, and a draft."""
    folder = tmp_path_factory.mktemp("stored")
    file, floats = stored_llama(folder)
    return file, floats, agreeing_eagle(folder / "draft", folder / "floats")


def engine(model: Path, draft: Path | None) -> Engine:
    return Engine(
        EngineConfig(
            model=str(model),
            draft_model=None if draft is None else str(draft),
            speculative_method=None if draft is None else "eagle",
            num_speculative_tokens=None if draft is None else 8,
            max_batch_size=8,
            max_batch_input_tokens=64,
            max_length=256,
        )
    )


@pytest.fixture(scope="module")
def pair(checkpoints: tuple[Path, Path, Path]) -> Engine:
    file, _, draft = checkpoints
    return engine(file, draft)


@pytest.fixture(scope="module")
def alone(checkpoints: tuple[Path, Path, Path]) -> Engine:
    return engine(checkpoints[0], None)


@pytest.fixture(scope="module")
def expected(alone: Engine) -> Sequence[list[int]]:
    """What the target alone answers, a prompt at a time."""
    return answers(alone, greedy_requests(PROMPTS, NEW_TOKENS, ignore_eos=True), 1)


@pytest.mark.parametrize("batch_size", [1, 3, 8])
@pytest.mark.parametrize("k", [1, 2, 3, 5, 8])
def test_a_draft_changes_no_token(
    pair: Engine, expected: Sequence[list[int]], k: int, batch_size: int
) -> None:
    requests = greedy_requests(PROMPTS, NEW_TOKENS, ignore_eos=True)
    with proposing(pair, k):
        assert answers(pair, requests, batch_size) == expected


def test_drafts_are_accepted(pair: Engine) -> None:
    with proposing(pair, 3):
        report = pair.generate(greedy_requests(PROMPTS, NEW_TOKENS, ignore_eos=True))
    assert report.mean_acceptance_length > 1.5


def test_a_batch_changes_no_token(alone: Engine, expected: Sequence[list[int]]) -> None:
    requests = greedy_requests(PROMPTS, NEW_TOKENS, ignore_eos=True)
    assert answers(alone, requests, 8) == expected


def test_answers_are_those_of_the_dequantised_weights(
    checkpoints: tuple[Path, Path, Path], expected: Sequence[list[int]]
) -> None:
    reference = TargetReference(checkpoints[1])
    exact = [
        assert_same_greedy(answer, reference.greedy(prompt, NEW_TOKENS, (), guess=answer))
        for prompt, answer in zip(PROMPTS, expected, strict=True)
    ]
    # Activations are rounded to 16 bits beside blocks; near-ties are rare.
    assert sum(exact) >= len(exact) - 1
