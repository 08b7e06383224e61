"""Greedy answers are those of the target alone, token by token.

Batch sizes, numbers of proposals and three groups of eight prompts form a Latin square: every
prompt runs in a batch of 8, each second one of them in a batch of 4, each fourth one alone. Tiny
pairs run batches of 12 beside, with as many proposals as a draft can make.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Collection, Iterable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from prompts import random_prompt, real_prompts
from reference.target import GreedyTrace, TargetReference, assert_same_greedy
from runs import MAX_LENGTH, answers, greedy_requests, load_tiny, proposing
from tiny import COMPILED_PAIRS, RELATIVE_PAIRS, TinyPair

from unispec.checkpoints.demo import DEMO_METHODS
from unispec.engine import Engine
from unispec.methods import Method

BATCH_SIZES = (1, 4, 8)
PROPOSALS = (1, 3, 5)
SHARES = {1: 4, 4: 2, 8: 1}
"""Of a batch size, each how many-th prompt it runs: small batches take longer for each prompt."""
CELLS = [(size, k) for size in BATCH_SIZES for k in PROPOSALS]
WIDE_CELLS = [(12, k) for k in (6, 7, 8)]
LEAST_EXACT = 0.95
"""Share of answers that are the target's to the last token: near-ties of float32 are rare."""
NEW_TOKENS = 32
LENGTHS = (1, 1, 2, 3, 5, 8, 13, 21, 34, 55, 63, 64, 65, 89, 100, 127, 128, 129, 144, 200, 233)
LENGTHS += (256, 257, 300)
"""Of the 24 random prompts; around chunks of 64 and pages of 128 tokens."""


class Expected:
    """What the target alone answers to some prompts, computed once each."""

    def __init__(
        self, target: TargetReference, prompts: Sequence[list[int]], eos: Collection[int]
    ) -> None:
        self.prompts = prompts
        self._target = target
        self._eos = eos
        self._traces: dict[tuple[int, ...], GreedyTrace] = {}

    def group(self, batch_size: int, k: int) -> Sequence[list[int]]:
        """The prompts that one cell of the square runs, long and short ones; half in a wide one."""
        if (batch_size, k) in WIDE_CELLS:
            return self.prompts[k % 2 :: 2]
        cell = BATCH_SIZES.index(batch_size) + PROPOSALS.index(k)
        third = self.prompts[cell % len(PROPOSALS) :: len(PROPOSALS)]
        return third[:: -SHARES[batch_size]]

    def same(self, prompt: Sequence[int], answer: Sequence[int]) -> bool:
        """Asserts that this is the target's answer; False where they part at a near-tie."""
        key = tuple(prompt)
        if key not in self._traces:
            self._traces[key] = self._target.greedy(prompt, NEW_TOKENS, self._eos, guess=answer)
        return assert_same_greedy(answer, self._traces[key])


class Answers:
    """The answers of an engine against the target's, each cell of the square run once."""

    def __init__(self, engine: Engine, expected: Expected) -> None:
        self._engine = engine
        self._expected = expected
        self._exact: dict[tuple[int, int], list[bool]] = {}

    def exact(self, batch_size: int, k: int) -> list[bool]:
        """Asserts that a cell's answers are right; which are so to the last token."""
        if (batch_size, k) not in self._exact:
            prompts = self._expected.group(batch_size, k)
            with proposing(self._engine, min(k, self._engine.max_speculative_tokens)):
                ours = answers(self._engine, greedy_requests(prompts, NEW_TOKENS), batch_size)
            same = map(self._expected.same, prompts, ours)
            self._exact[batch_size, k] = list(same)
        return self._exact[batch_size, k]


@pytest.fixture(scope="module")
def demo_expected(demo_engine: Engine, demo_target: TargetReference) -> Expected:
    prompts = real_prompts(demo_engine.tokenizer)
    return Expected(demo_target, prompts, demo_engine.eos_token_ids)


@pytest.fixture(scope="module")
def tiny_expected(tiny_target: Callable[[str], TargetReference]) -> Callable[[str], Expected]:
    expected: dict[str, Expected] = {}

    def of(name: str) -> Expected:
        if name not in expected:
            target = tiny_target(name)
            vocab_size = len(target.embedding)
            prompts = [
                random_prompt(vocab_size, length, seed=index)
                for index, length in enumerate(LENGTHS)
            ]
            expected[name] = Expected(target, prompts, eos={2})
        return expected[name]

    return of


@pytest.fixture(scope="module")
def demo_answers(
    demo_engines: Callable[[Method], Engine], demo_expected: Expected
) -> Callable[[Method], Answers]:
    return cache(lambda method: Answers(demo_engines(method), demo_expected))


@pytest.fixture(scope="module")
def tiny_answers(
    tiny_engine: Callable[[str], Engine], tiny_expected: Callable[[str], Expected]
) -> Callable[[str], Answers]:
    return cache(lambda name: Answers(tiny_engine(name), tiny_expected(name)))


@pytest.mark.parametrize(("batch_size", "k"), CELLS)
@pytest.mark.parametrize("method", DEMO_METHODS)
def test_smollm2_answers_as_it_does_alone(
    demo_answers: Callable[[Method], Answers],
    exact: Callable[[str, Iterable[bool]], None],
    method: Method,
    batch_size: int,
    k: int,
) -> None:
    exact(f"SmolLM2 {method}", demo_answers(method).exact(batch_size, k))


@pytest.mark.parametrize("method", DEMO_METHODS)
def test_nearly_every_answer_of_smollm2_is_exact(
    demo_answers: Callable[[Method], Answers], method: Method
) -> None:
    found = [same for cell in CELLS for same in demo_answers(method).exact(*cell)]
    assert sum(found) >= LEAST_EXACT * len(found)


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize(("batch_size", "k"), [*CELLS, *WIDE_CELLS])
@pytest.mark.parametrize("name", [*COMPILED_PAIRS, *RELATIVE_PAIRS])
def test_tiny_llama_answers_as_it_does_alone(
    tiny_answers: Callable[[str], Answers],
    exact: Callable[[str, Iterable[bool]], None],
    name: str,
    batch_size: int,
    k: int,
) -> None:
    exact(name, tiny_answers(name).exact(batch_size, k))


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("name", [*COMPILED_PAIRS, *RELATIVE_PAIRS])
def test_nearly_every_answer_of_a_tiny_llama_is_exact(
    tiny_answers: Callable[[str], Answers], name: str
) -> None:
    cells = [*CELLS, *WIDE_CELLS]
    found = [same for cell in cells for same in tiny_answers(name).exact(*cell)]
    assert sum(found) >= LEAST_EXACT * len(found)


@pytest.fixture(scope="module", params=["a tied head that differs", "Mistral"])
def other_config(
    request: pytest.FixtureRequest,
    tiny_pair: Callable[[str], TinyPair],
    tmp_path_factory: pytest.TempPathFactory,
) -> tuple[Engine, TargetReference]:
    """`llama_eagle_agreeing`, of which config.json says something else: the graph is the same.

    transformers reads that config.json, too, so that its Mistral is what ours is compared with.
    """
    pair, root = tiny_pair("llama_eagle_agreeing"), tmp_path_factory.mktemp("other")
    mistral = {"model_type": "mistral", "architectures": ["MistralForCausalLM"]}
    changes: dict[str, dict[str, Any]] = {"target": {"tie_word_embeddings": True}, "draft": {}}
    if request.param == "Mistral":
        changes = {"target": {**mistral, "sliding_window": MAX_LENGTH}, "draft": mistral}
    for part, fields in changes.items():
        file = Path(shutil.copytree(getattr(pair, part), root / part)) / "config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | fields))
    return load_tiny(TinyPair(root / "target", root / "draft")), TargetReference(root / "target")


@pytest.mark.usefixtures("one_thread")
def test_a_llama_of_another_config_answers_as_it_does_alone(
    other_config: tuple[Engine, TargetReference],
    exact: Callable[[str, Iterable[bool]], None],
) -> None:
    engine, target = other_config
    prompts = [random_prompt(len(target.embedding), length, seed=length) for length in LENGTHS[::3]]
    expected = Expected(target, prompts, eos={2})
    report = engine.generate(greedy_requests(prompts, NEW_TOKENS))
    ours = [result.token_ids for result in report.results]
    exact("llama_eagle_agreeing of another config", map(expected.same, prompts, ours))
    drafted = sum(result.drafted for result in report.results)
    assert sum(result.accepted for result in report.results) > 0.3 * drafted


@pytest.mark.usefixtures("one_thread")
def test_target_without_a_draft(
    target_only_engine: Engine,
    tiny_expected: Callable[[str], Expected],
    exact: Callable[[str, Iterable[bool]], None],
) -> None:
    prompts = tiny_expected("llama_eagle_agreeing").prompts
    ours = answers(target_only_engine, greedy_requests(prompts, NEW_TOKENS))
    exact(
        "llama_eagle_agreeing without a draft",
        map(tiny_expected("llama_eagle_agreeing").same, prompts, ours),
    )
