"""Sampled drafts: each is a new draw from the draft's own law, and answers keep the target's.

A round of a sequential draft, or a slot of a block, that draws with the number of another one
proposes tokens that hang together, and where drafts are near the target most of them stand.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from max.pipelines.context import SamplingParams
from max.pipelines.request import RequestID
from prompts import random_prompt
from reference.dflash import DFlashReference
from reference.eagle import EagleReference
from reference.eagle3 import Eagle3Reference
from reference.mtp import MtpReference
from reference.philox import numbers
from reference.target import TargetReference
from runs import load_tiny, observing, proposing
from tiny import TinyPair, flat_pair
from torch import Tensor
from transformers import DynamicCache
from uniform_places import p_values, places

from unispec.engine import Engine, Request, Step
from unispec.methods import Method
from unispec.sampling.seeds import Stream

FloatArray = npt.NDArray[np.float64]

CASES = [
    pytest.param(name, k, id=f"{method}-{k}")
    for name, method, proposals in (
        ("llama_eagle_biased", "eagle", (1, 2, 5, 8)),
        ("llama_eagle3_sampled", "eagle3", (1, 2, 5, 8)),
        ("llama_dflash_agreeing", "dflash", (1, 2, 5)),
        ("deepseek_mtp_sampled", "mtp", (1, 2, 5, 8)),
    )
    for k in proposals
]
"""Pairs whose drafts are sampled, and how many they propose."""

P_VALUE = 1e-3
"""Least p-value of right answers; all seeds are fixed."""


@dataclass(frozen=True)
class Sampled:
    """What the graph proposed after a step."""

    token_ids: list[int]
    """Verified tokens, then the target's next token."""
    drafts: list[int]
    laws: FloatArray
    """[K, V], what it says it drew them from."""
    seed: int
    temperature: float


@contextmanager
def recording(engine: Engine) -> Iterator[dict[RequestID, list[Sampled]]]:
    """Takes down each unfinished request's proposals after every step."""
    recorded: dict[RequestID, list[Sampled]] = {}

    def record(step: Step) -> None:
        for one in step.rows:
            context, row = one.context, one.row
            if row.drafts and not context.is_done:
                assert row.draft_probs is not None
                sampled = Sampled(
                    context.tokens.all.tolist(),
                    list(row.drafts),
                    np.asarray(row.draft_probs.read(), np.float64),
                    context.sampling_params.seed,
                    context.sampling_params.temperature,
                )
                recorded.setdefault(context.request_id, []).append(sampled)

    with observing(engine, record):
        yield recorded


class Following(EagleReference):
    """Runs an EAGLE draft on the tokens that the graph proposed, not on its own."""

    _given: list[int]
    _logits: list[Tensor]

    def _rows(
        self, next_ids: Sequence[int], features: Tensor, cache: DynamicCache
    ) -> tuple[int, Tensor]:
        _, output = super()._rows(next_ids, features, cache)
        self._logits.append(self.logits(output)[0])  # [N]
        return self._given.pop(0), output

    @torch.inference_mode()
    def step_logits(self, steps: Sequence[Sampled]) -> list[Tensor]:
        """Of one request's steps, [K, N] each."""
        _, features = self.read(steps[-1].token_ids[:-1], self.target.new_cache())
        draft_cache, found = DynamicCache(config=self.config), []
        for step in steps:
            ids = step.token_ids
            self._given, self._logits = list(step.drafts), []
            rows = features[draft_cache.get_seq_length() : len(ids) - 1]
            self._propose_on(draft_cache, ids, rows, len(step.drafts))
            found.append(torch.stack(self._logits))
        return found


class FollowingEagle3(Following, Eagle3Reference):
    """As an EAGLE draft, with another layer over other features."""


class FollowingMtp(Following, MtpReference):
    """As an EAGLE draft; the layer is the target's own."""


FOLLOWING: dict[Method, type[Following]] = {
    "eagle": Following,
    "eagle3": FollowingEagle3,
    "mtp": FollowingMtp,
}


class Filling(DFlashReference):
    """Fills the blocks of all steps from one pass of the target."""

    def block_logits(self, steps: Sequence[Sampled]) -> list[Tensor]:
        """Of one request's steps, [K, N] each."""
        context = self.context(self.taps(steps[-1].token_ids[:-1]))
        return [
            self.logits(step.token_ids[-1], context[: len(step.token_ids) - 1])[: len(step.drafts)]
            for step in steps
        ]


def drafts_laws(
    pair: TinyPair, target: TargetReference, steps: Sequence[Sampled]
) -> Iterator[FloatArray]:
    """The laws [K, V] of one request's drafts after each step, in torch."""
    folder = pair.draft or pair.target
    draft: Following | Filling
    if pair.method == "dflash":
        draft = Filling(folder, target)
        logits = draft.block_logits(steps)
    else:
        draft = FOLLOWING[pair.method](folder, target)
        logits = draft.step_logits(steps)
    for step, scores in zip(steps, logits, strict=True):
        law = np.zeros((len(scores), len(target.embedding)))
        soft = (scores.double() / step.temperature).softmax(dim=-1)
        law[:, draft.target_ids.numpy()] = soft.numpy()
        yield law


def sampled_requests(
    prompts: Sequence[Sequence[int]], seeds: Sequence[int], new_tokens: int, **law: Any
) -> list[Request]:
    """One request a prompt and seed."""
    bias = law.pop("logit_bias", {})
    return [
        Request(
            token_ids=prompt,
            sampling=SamplingParams(seed=seed, max_new_tokens=new_tokens, ignore_eos=True, **law),
            logit_bias=bias,
        )
        for prompt, seed in zip(prompts, seeds, strict=True)
    ]


HEAD = {
    "llama_eagle_biased": 0.02,
    "llama_eagle3_sampled": 0.02,
    "llama_dflash_agreeing": 0.1,
    "deepseek_mtp_sampled": 0.1,
}
"""What a pair's head is multiplied by to bring its draft near to the target."""

BIAS = 4.0
"""On the tokens that a draft of a reduced vocabulary knows."""


class Near:
    """A pair whose draft is near its target, and at which law.

    Args:
        name: of the pair.
        pair: as it is; its graph serves here too.
        folder: for the pair that is near.
    """

    def __init__(self, name: str, pair: TinyPair, folder: Path) -> None:
        self.pair = pair = flat_pair(folder, pair, HEAD[name])
        self.engine = load_tiny(pair)
        self.target = TargetReference(pair.target)
        self.law: dict[str, Any] = {"temperature": 1.0}
        if pair.draft is not None:
            references = {"eagle3": Eagle3Reference, "dflash": DFlashReference}
            reference: Any = references.get(pair.method, EagleReference)
            known = reference(pair.draft, self.target).target_ids.tolist()
            self.law["logit_bias"] = dict.fromkeys(known, BIAS)


@pytest.fixture(scope="module")
def near_engine(
    tiny_pair: Callable[[str], TinyPair],
    tiny_engine: Callable[[str], Engine],
    tmp_path_factory: pytest.TempPathFactory,
) -> Callable[[str], Near]:
    """By the pair's name, loaded once each, in the worker whose `tiny_engine` has the graph."""
    return cache(lambda name: Near(name, tiny_pair(name), tmp_path_factory.mktemp(name)))


# What is proposed


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize(("name", "k"), CASES)
def test_every_draft_is_a_draw_of_its_own_from_the_drafts_law(
    tiny_pair: Callable[[str], TinyPair],
    tiny_engine: Callable[[str], Engine],
    tiny_target: Callable[[str], TargetReference],
    near_engine: Callable[[str], Near],
    name: str,
    k: int,
) -> None:
    """The law is the torch draft's; the number is that of the request's seed and the position."""
    near, apart = near_engine(name), []
    lengths = (1, 5, 63, 64, 65, 127, 129, 200, 9, 33, 2)
    prompts = [random_prompt(256, length, seed=30 + k) for length in lengths]
    seeds = [k, 2**40 + k, 2**63 + k, *range(100, 108)]
    for engine, pair, target, temperature in (
        (tiny_engine(name), tiny_pair(name), tiny_target(name), 1.0),
        (near.engine, near.pair, near.target, 2.0),
    ):
        engine.reset_prefix_cache()
        requests = sampled_requests(prompts, seeds, 16, temperature=temperature)
        with proposing(engine, k), recording(engine) as recorded:
            engine.generate(requests)
        assert len(recorded) == len(requests)
        for steps in recorded.values():
            for step, law in zip(steps, drafts_laws(pair, target, steps), strict=True):
                apart += np.abs(step.laws - law).sum(axis=-1).tolist()
                assert_drawn(step, k)
    # Rounding grows from round to round where laws are sharp.
    assert np.mean(apart) < 1e-3
    assert max(apart) < 0.1


def assert_drawn(step: Sampled, k: int) -> None:
    """Each draft is where the number of its seed and position lies in the mass of its law."""
    assert len(step.drafts) == k
    coins = numbers(step.seed, len(step.token_ids) + np.arange(k), Stream.DRAFT)  # [K]
    for token, law, coin in zip(step.drafts, step.laws, coins, strict=True):
        ends = law.cumsum() / law.sum()
        assert ends[token] - law[token] / law.sum() - 1e-6 <= coin < ends[token] + 1e-6


# What is answered

ANSWERS, LENGTH = 100, 41


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize(("name", "k"), [c for c in CASES if c.values[1] > 1])
def test_answers_follow_the_targets_law_where_runs_of_drafts_stand(
    near_engine: Callable[[str], Near], name: str, k: int
) -> None:
    near = near_engine(name)
    engine, target, law = near.engine, near.target, near.law
    prompts = [random_prompt(256, 5, seed=index) for index in range(ANSWERS)]
    requests = sampled_requests(prompts, range(1000 * k, 1000 * k + ANSWERS), LENGTH, **law)
    with proposing(engine, k):
        report = engine.generate(requests)
    first, second, *_ = report.acceptance_per_position
    assert first >= 0.6
    assert second >= 0.35
    drafted = places(target, requests, report, **law)[:, 1:]  # the first token is not drafted
    assert min(p_values(drafted)) > P_VALUE


def test_answers_that_hang_together_are_seen() -> None:
    """The test above has power: one number for two neighbours in every fourth pair is refused."""
    values = np.random.default_rng(3).random((ANSWERS, LENGTH - 1))
    assert min(p_values(values)) > P_VALUE
    values[: ANSWERS // 4, 1::2] = values[: ANSWERS // 4, 0::2]
    assert min(p_values(values)) < 1e-6
