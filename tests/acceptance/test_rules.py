"""One step of each acceptance rule: which drafts stand, and which tokens come out."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import pytest
from acceptance_graph import (
    MAX_ROWS,
    RATE,
    RELAXED_DELTA,
    RELAXED_TOP_N,
    VOCAB,
    AcceptanceGraph,
    Request,
    Verdict,
    masks,
)
from acceptance_laws import (
    LOSSLESS,
    ODD,
    P_VALUE,
    REQUESTS,
    FloatArray,
    IntArray,
    draws,
    noise,
    sample,
)
from reference.chi_square import chi_square_p_value
from scipy import special, stats

from unispec.sampling.seeds import Stream

BROKEN_P_VALUE = 1e-6
"""Highest p-value of a wrong one."""

ROWS = 5 * MAX_ROWS
LOGITS = noise(21, 3, VOCAB)
NEAR = np.asarray(special.softmax(LOGITS[:2] + noise(22, 2, VOCAB, scale=1.0), axis=-1), np.float64)
SECOND_BEST = np.argsort(LOGITS[:2], axis=-1)[:, -2]

DRAFTERS: dict[str, FloatArray] = {
    "void": np.zeros((2, VOCAB)),
    "uniform": np.full((2, VOCAB), 1 / VOCAB),
    "near": NEAR,
    "near, then void": NEAR * [[1], [0]],
    "sparse": NEAR * ODD / (NEAR * ODD).sum(axis=-1, keepdims=True),
    "one-hot": np.eye(VOCAB)[SECOND_BEST],
}
"""The law [2, V] of each draft; zero is a void draft."""

LOSSY = ["naive", "relaxed", "synthetic"]


@dataclass(frozen=True)
class Experiment:
    """One step of many requests that differ in their seeds."""

    chosen: IntArray  # [N], index into REQUESTS
    verdicts: Mapping[str, Verdict]


@pytest.fixture(scope="session")
def experiment(graph: AcceptanceGraph) -> Callable[[str], Experiment]:
    """Runs a drafter's experiment, once each; drafts are drawn as the draft does it."""
    done: dict[str, Experiment] = {}

    def run(drafter: str) -> Experiment:
        if drafter not in done:
            done[drafter] = run_experiment(graph, drafter)
        return done[drafter]

    return run


def run_experiment(graph: AcceptanceGraph, drafter: str) -> Experiment:
    rng = np.random.default_rng(1000 + list(DRAFTERS).index(drafter))
    kinds = list(REQUESTS.values())
    law = DRAFTERS[drafter]
    stated = np.where(law.any(axis=-1, keepdims=True), law, NEAR)  # a void draft's law is stale
    chosen = rng.integers(0, len(kinds), ROWS)
    seeds = rng.integers(0, 2**64, ROWS, dtype=np.uint64).tolist()
    parts = []
    for start in range(0, ROWS, MAX_ROWS):
        end = start + MAX_ROWS
        batch = [kinds[kind] for kind in chosen[start:end]]
        coins = draws(graph, seeds[start:end], 2)[Stream.DRAFT]
        outcome = graph.run(
            [request.row(seed) for request, seed in zip(batch, seeds[start:end], strict=True)],
            LOGITS,
            sample(law, coins),
            draft_probs=stated.astype(np.float32),
            thinking=True,
            allowed=masks(batch),
        )
        parts.append(outcome.verdicts)
    verdicts = {}
    for rule in (*LOSSLESS, *LOSSY):
        columns = zip(*(part[rule] for part in parts), strict=True)
        verdicts[rule] = Verdict(*(np.concatenate(column) for column in columns))
    return Experiment(chosen, verdicts)


FIRST = np.stack([request.distribution(LOGITS[0]) for request in REQUESTS.values()])
"""Law of the first token [R, V]."""

SECOND = np.stack(
    [
        [request.distribution(LOGITS[1], [first]) for first in range(VOCAB)]
        for request in REQUESTS.values()
    ]
)
"""Law of the second token, given the first, [R, V, V]."""


def first_token_p_value(experiment: Experiment, rule: str) -> float:
    """Chi-square of the first emitted token over all requests of the mixture."""
    counts = np.zeros_like(FIRST)
    np.add.at(counts, (experiment.chosen, experiment.verdicts[rule].tokens[:, 0]), 1)
    return chi_square_p_value(counts.ravel(), FIRST.ravel() / len(FIRST))


def first_accepted(rule: str, drafter: str) -> FloatArray:
    """Probability [R, V] that the first draft is this token and stands."""
    q = DRAFTERS[drafter][0]
    return np.asarray(np.minimum(FIRST, q) if rule == "rejection" else FIRST * q)


@pytest.mark.parametrize("drafter", DRAFTERS)
@pytest.mark.parametrize("rule", LOSSLESS)
def test_first_token_is_the_targets(
    experiment: Callable[[str], Experiment], rule: str, drafter: str
) -> None:
    assert first_token_p_value(experiment(drafter), rule) > P_VALUE


@pytest.mark.parametrize("drafter", ["near", "sparse", "one-hot"])
@pytest.mark.parametrize("rule", LOSSY)
def test_a_lossy_rule_is_found_out(
    experiment: Callable[[str], Experiment], rule: str, drafter: str
) -> None:
    assert first_token_p_value(experiment(drafter), rule) < BROKEN_P_VALUE


@pytest.mark.parametrize("drafter", DRAFTERS)
@pytest.mark.parametrize("rule", LOSSLESS)
def test_drafts_stand_as_often_as_they_can(
    experiment: Callable[[str], Experiment], rule: str, drafter: str
) -> None:
    done = experiment(drafter)
    num_accepted, _, tokens = done.verdicts[rule]
    accepted = first_accepted(rule, drafter)
    law = np.stack([FIRST - accepted, accepted], axis=1).clip(0)  # [R, 2, V]
    counts = np.zeros_like(law)
    np.add.at(counts, (done.chosen, (num_accepted > 0).astype(np.int64), tokens[:, 0]), 1)
    assert chi_square_p_value(counts.ravel(), law.ravel() / len(law)) > P_VALUE


@pytest.mark.parametrize("drafter", [name for name in DRAFTERS if name != "void"])
@pytest.mark.parametrize("rule", LOSSLESS)
def test_second_token_is_the_targets_behind_an_accepted_first(
    experiment: Callable[[str], Experiment], rule: str, drafter: str
) -> None:
    done = experiment(drafter)
    num_accepted, _, tokens = done.verdicts[rule]
    law = first_accepted(rule, drafter)[..., np.newaxis] * SECOND  # [R, V, V]
    counts = np.zeros_like(law)
    stands = num_accepted > 0
    np.add.at(counts, (done.chosen[stands], tokens[stands, 0], tokens[stands, 1]), 1)
    assert chi_square_p_value(counts.ravel(), law.ravel() / law.sum()) > P_VALUE


@pytest.mark.parametrize("rule", LOSSLESS)
def test_void_drafts_never_stand(experiment: Callable[[str], Experiment], rule: str) -> None:
    assert experiment("void").verdicts[rule].num_accepted.max() == 0
    assert experiment("near, then void").verdicts[rule].num_accepted.max() == 1


def test_next_token_ends_the_run(experiment: Callable[[str], Experiment]) -> None:
    for verdict in experiment("near").verdicts.values():
        assert set(verdict.num_accepted.tolist()) == {0, 1, 2}
        last = np.take_along_axis(verdict.tokens, verdict.num_accepted[:, np.newaxis], axis=1)
        np.testing.assert_array_equal(last[:, 0], verdict.next_tokens)


def test_drafts_from_the_target_itself_always_stand(graph: AcceptanceGraph) -> None:
    batch = 5_000
    request = REQUESTS["top_p"]
    rows = [request.row(seed) for seed in range(batch)]
    probs = np.stack([request.distribution(raw) for raw in LOGITS[:2]])
    drafts = sample(probs, draws(graph, range(batch), 2)[Stream.DRAFT])
    verdict = graph.run(rows, LOGITS, drafts, draft_probs=probs.astype(np.float32))
    # p and q are rounded differently, so a coin next to 1 may refuse.
    assert (verdict.verdicts["rejection"].num_accepted == 2).mean() > 0.999


def test_greedy_rows_follow_the_argmax(graph: AcceptanceGraph) -> None:
    rng = np.random.default_rng(31)
    batch, k = 512, 4
    logits = np.round(noise(32, batch, k + 1, VOCAB), 1)  # many ties
    best = logits.argmax(axis=-1)  # [B, K + 1]
    drafts = np.where(
        rng.random((batch, k)) < 0.7, best[:, :-1], rng.integers(-1, VOCAB, (batch, k))
    )
    greedy = rng.random(batch) < 0.5
    rows = [
        Request(temperature=0.0 if cold else 1.0, top_p=0.9).row(i) for i, cold in enumerate(greedy)
    ]
    outcome = graph.run(rows, logits, drafts, draft_probs=np.full(VOCAB, 1 / VOCAB, np.float32))
    expected = np.cumprod(drafts == best[:, :-1], axis=1).sum(axis=1)
    for rule in (*LOSSLESS, "relaxed"):
        verdict = outcome.verdicts[rule]
        np.testing.assert_array_equal(verdict.num_accepted[greedy], expected[greedy])
        for row in np.flatnonzero(greedy):
            count = expected[row] + 1
            np.testing.assert_array_equal(verdict.tokens[row, :count], best[row, :count])
        assert (verdict.num_accepted != expected)[~greedy].any()


def test_batch_mates_change_nothing(graph: AcceptanceGraph) -> None:
    rng = np.random.default_rng(41)
    batch, k = 60, 3
    kinds = list(REQUESTS.values())
    mixture = [kinds[index % len(kinds)] for index in range(batch)]
    seeds = rng.integers(0, 2**64, batch, dtype=np.uint64).tolist()
    logits = noise(42, batch, k + 1, VOCAB)
    drafts = np.where(
        rng.random((batch, k)) < 0.5, logits[:, :-1].argmax(-1), rng.integers(-1, VOCAB, (batch, k))
    )
    probs = special.softmax(noise(43, batch, k, VOCAB), axis=-1)
    first = rng.integers(0, 1000, batch)
    thinking = rng.random(batch) < 0.5

    def emitted(members: Sequence[int]) -> dict[tuple[str, int], list[int]]:
        index = list(members)
        requests = [mixture[member] for member in index]
        outcome = graph.run(
            [mixture[member].row(seeds[member], generated=[4, 4, 9]) for member in index],
            logits[index],
            drafts[index],
            first_position=first[index],
            draft_probs=probs[index],
            thinking=thinking[index],
            allowed=masks(requests),
        )
        return {
            (rule, member): tokens
            for rule, verdict in outcome.verdicts.items()
            for member, tokens in zip(index, verdict.emitted(), strict=True)
        }

    together = emitted(range(batch))
    assert len({len(tokens) for tokens in together.values()}) == k + 1
    for members in (
        range(batch)[::-1],
        range(0, batch, 7),
        range(11, 28),
        *([m] for m in range(14)),
    ):
        for key, value in emitted(members).items():
            assert value == together[key], key


def test_relaxed_follows_its_definition(graph: AcceptanceGraph) -> None:
    rng = np.random.default_rng(71)
    batch, k = 700, 3
    kinds = list(REQUESTS.values())
    requests = [kinds[row % len(kinds)] for row in range(batch)]
    logits = noise(72, batch, k + 1, VOCAB)
    ranked = np.argsort(-logits, axis=-1)[:, :-1]  # [B, K, V]
    drafts = np.take_along_axis(ranked, rng.integers(0, 5, (batch, k, 1)), axis=-1)[..., 0]
    drafts[rng.random((batch, k)) < 0.05] = -1
    thinking = rng.random(batch) < 0.5
    outcome = graph.run(
        [request.row(seed) for seed, request in enumerate(requests)],
        logits,
        drafts,
        thinking=thinking,
        allowed=masks(requests),
    )
    own = own_tokens(graph, requests, logits, drafts)
    expected, strict = [], []
    for row, request in enumerate(requests):
        near = thinking[row] & np.array(
            [is_near(request, logits[row, j], drafts[row, :j], drafts[row, j]) for j in range(k)]
        )
        matches = drafts[row] == own[row, :-1]
        strict.append(run_of(matches, drafts[row], own[row]))
        expected.append(run_of(matches | near, drafts[row], own[row]))
    assert outcome.verdicts["matching"].emitted() == strict
    assert outcome.verdicts["relaxed"].emitted() == expected
    assert sum(map(len, expected)) > 1.2 * sum(map(len, strict))


def own_tokens(
    graph: AcceptanceGraph,
    requests: Sequence[Request],
    logits: npt.NDArray[np.float32],
    drafts: IntArray,
) -> IntArray:
    """What the target alone draws [B, K + 1] behind each row's drafts; the seed is the row."""
    columns = []
    for position in range(drafts.shape[1] + 1):
        before = [[t for t in row[:position] if t >= 0] for row in drafts.tolist()]
        outcome = graph.run(
            [r.row(seed, before[seed]) for seed, r in enumerate(requests)],
            logits[:, position : position + 1],
            drafts[:, :0],
            first_position=position,
            allowed=masks(requests),
        )
        columns.append(outcome.verdicts["matching"].next_tokens)
    return np.stack(columns, axis=1)


def is_near(
    request: Request, logits: npt.NDArray[np.float32], before: IntArray, draft: int
) -> bool:
    """Whether a draft is close to the top of the target, before temperature and truncation."""
    plain = replace(request, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0)
    p = plain.distribution(logits, [int(token) for token in before if token >= 0])
    return bool(
        draft >= 0
        and p[draft] > 0
        and draft in np.argsort(-p)[:RELAXED_TOP_N]
        and p[draft] >= p.max() - RELAXED_DELTA
    )


def run_of(stands: npt.NDArray[np.bool_], drafts: IntArray, own: IntArray) -> list[int]:
    """The drafts up to the first that does not stand, then the target's own token."""
    count = int(np.cumprod(stands).sum())
    return [*drafts[:count].tolist(), int(own[count])]


def test_synthetic_accepts_at_its_rate(graph: AcceptanceGraph) -> None:
    batch, k = MAX_ROWS, 3
    drafts = np.random.default_rng(81).integers(0, VOCAB, (batch, k))
    drafts[: batch // 10, 1] = -1
    request = Request(top_k=5)
    verdict = graph.run(
        [request.row(seed) for seed in range(batch)], noise(82, k + 1, VOCAB), drafts
    ).verdicts["synthetic"]
    full = verdict.num_accepted[batch // 10 :]
    law = [1 - RATE, (1 - RATE) * RATE, (1 - RATE) * RATE**2, RATE**3]
    assert chi_square_p_value(np.bincount(full, minlength=k + 1), law) > P_VALUE
    cut = verdict.num_accepted[: batch // 10]
    assert stats.binomtest(int((cut == 1).sum()), len(cut), RATE).pvalue > P_VALUE
    assert cut.max() == 1
    for count, row, draft in zip(verdict.num_accepted, verdict.tokens, drafts, strict=True):
        np.testing.assert_array_equal(row[:count], draft[:count])
    ends = verdict.next_tokens[verdict.num_accepted == k]
    expected = request.distribution(noise(82, k + 1, VOCAB)[k])
    assert chi_square_p_value(np.bincount(ends, minlength=VOCAB), expected) > P_VALUE
