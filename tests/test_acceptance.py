"""What is sampled, and what stands: the target distribution, the draws and the rules."""

from __future__ import annotations

import itertools
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
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from reference.chi_square import chi_square_p_value
from scipy import special, stats

from unispec.sampling.seeds import Stream

FloatArray = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.int64]

P_VALUE = 1e-3
"""Least p-value of a right sampler; all seeds are fixed."""
BROKEN_P_VALUE = 1e-6
"""Highest p-value of a wrong one."""

ODD = np.arange(VOCAB) % 2 == 1
THIRDS = np.arange(VOCAB) % 3 != 0


@pytest.fixture(scope="session")
def graph() -> AcceptanceGraph:
    """All rules, compiled once."""
    return AcceptanceGraph()


# The target distribution


def noise(seed: int, *shape: int, scale: float = 1.5) -> npt.NDArray[np.float32]:
    """Random logits."""
    return np.random.default_rng(seed).normal(0, scale, shape).astype(np.float32)


def assert_exact(
    graph: AcceptanceGraph,
    requests: Sequence[Request],
    logits: npt.NDArray[np.float32],
    drafts: IntArray,
    generated: Sequence[Sequence[int]],
) -> None:
    """Compares the graph's distribution [B, K + 1, V] with the exact one."""
    rows = [
        request.row(seed=0, generated=ids) for request, ids in zip(requests, generated, strict=True)
    ]
    actual = graph.run(rows, logits, drafts, allowed=masks(requests)).probs
    for row, request in enumerate(requests):
        # Rounding in a logit grows with 1 / temperature.
        rtol = min(1e-5 / min(request.temperature or 1.0, 1.0), 1e-3)
        for position, raw in enumerate(logits[row]):
            before = [*generated[row], *(int(t) for t in drafts[row, :position] if t >= 0)]
            expected = request.distribution(raw, before)
            np.testing.assert_allclose(
                actual[row, position],
                expected,
                rtol=rtol,
                atol=1e-10,
                err_msg=f"{request}, position {position} after {before}",
            )
            assert not actual[row, position][expected == 0].any()


STEPS = np.repeat([3, 2, 2, 1, 0], VOCAB // 5).astype(np.float32)
PAIR = np.where(np.arange(VOCAB) < 2, 1, -1e4).astype(np.float32)
SINGLE = np.arange(VOCAB) == 37
PENALTIES = Request(
    presence_penalty=0.7,
    frequency_penalty=0.4,
    repetition_penalty=1.3,
    prompt=(0, 1, 2, 39),
)


@dataclass(frozen=True)
class Case:
    """One request, what it has generated, and the drafts of the step."""

    request: Request
    logits: npt.NDArray[np.float32] | None = None
    generated: tuple[int, ...] = ()
    drafts: tuple[int, ...] = (5, 17)


CASES = {
    "plain": Case(Request()),
    "cold": Case(Request(temperature=0.05)),
    "colder than any logit": Case(Request(temperature=1e-30)),
    "hot": Case(Request(temperature=2.0)),
    "no draft": Case(Request(top_k=5), drafts=()),
    "eight drafts": Case(PENALTIES, drafts=(5, 5, 17, 3, 5, 17, 0, 39)),
    "greedy": Case(Request(temperature=0.0)),
    "greedy, first of a tie": Case(Request(temperature=0.0), logits=STEPS[::-1]),
    "greedy, behind a bias": Case(Request(temperature=0.0, logit_bias={31: 50.0})),
    "greedy, behind a mask": Case(Request(temperature=0.0, allowed=ODD)),
    "greedy, behind penalties": Case(
        replace(PENALTIES, temperature=0.0, frequency_penalty=2.0), generated=(1, 2, 3, 3)
    ),
    "top-k of one": Case(Request(top_k=1)),
    "top-k": Case(Request(top_k=9)),
    "top-k of all": Case(Request(top_k=VOCAB)),
    "top-k beyond all": Case(Request(top_k=VOCAB + 1)),
    "top-k negative": Case(Request(top_k=-1)),
    "top-k with a tie": Case(Request(top_k=11), logits=STEPS),
    "top-k at large logits": Case(Request(top_k=6), logits=noise(1, VOCAB, scale=20) + 1e3),
    "top-p": Case(Request(top_p=0.85)),
    "top-p of next to nothing": Case(Request(top_p=1e-6)),
    "top-p of nothing": Case(Request(top_p=0.0)),
    "top-p of nearly all": Case(Request(top_p=0.999)),
    "top-p with a tie": Case(Request(top_p=0.7), logits=STEPS),
    "top-p, half of two": Case(Request(top_p=0.25), logits=PAIR),
    "min-p": Case(Request(min_p=0.2)),
    "min-p of one": Case(Request(min_p=1.0)),
    "min-p of one with a tie": Case(Request(min_p=1.0), logits=STEPS),
    "top-p counts what top-k left": Case(Request(top_k=6, top_p=0.7)),
    "min-p after both": Case(Request(top_k=20, top_p=0.9, min_p=0.15)),
    "truncation after temperature": Case(Request(temperature=0.4, top_p=0.8, min_p=0.05)),
    "presence": Case(Request(presence_penalty=1.5), generated=(3, 3, 8)),
    "presence reward": Case(Request(presence_penalty=-1.5), generated=(3, 3, 8)),
    "presence spares the prompt": Case(Request(presence_penalty=1.5, prompt=(3, 8))),
    "frequency": Case(Request(frequency_penalty=0.6), generated=(3, 3, 3, 8)),
    "frequency spares the prompt": Case(Request(frequency_penalty=0.6, prompt=(3, 3, 8))),
    "repetition": Case(Request(repetition_penalty=1.4), generated=(3, 8, 20, 21)),
    "repetition reward": Case(Request(repetition_penalty=0.7), generated=(3, 8, 20, 21)),
    "repetition reads the prompt": Case(Request(repetition_penalty=1.4, prompt=(3, 8, 20, 21))),
    "prompt token generated": Case(PENALTIES, generated=(2, 2, 39, 7)),
    "drafts count": Case(PENALTIES, drafts=(5, 5, 39, 5)),
    "drafts count on generated": Case(PENALTIES, generated=(5, 39), drafts=(5, 39, 6)),
    "void drafts do not count": Case(PENALTIES, drafts=(-1, 5, -1)),
    "bias": Case(Request(logit_bias={0: 2.5, 39: -3.0})),
    "bias that bans and forces": Case(Request(logit_bias={4: -1e30, 31: 100.0})),
    "mask": Case(Request(allowed=ODD)),
    "mask of one": Case(Request(allowed=SINGLE)),
    "mask before truncation": Case(Request(allowed=ODD, top_k=4, top_p=0.9)),
    "mask over a bias": Case(Request(allowed=ODD, logit_bias={0: 80.0})),
    "mask of one that a bias bans": Case(Request(allowed=SINGLE, logit_bias={37: -3e38})),
    "greedy, mask of one that a bias bans": Case(
        Request(temperature=0.0, allowed=SINGLE, logit_bias={37: -3e38})
    ),
    "mask over the largest bias": Case(Request(allowed=ODD, logit_bias={0: 3e38, 1: -3e38})),
    "everything": Case(
        replace(
            PENALTIES,
            temperature=0.8,
            top_k=15,
            top_p=0.93,
            min_p=0.02,
            logit_bias={6: 1.5, 7: -1.0},
            allowed=THIRDS,
        ),
        generated=(7, 7, 10),
        drafts=(7, 11, -1),
    ),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_distribution(graph: AcceptanceGraph, case: Case) -> None:
    count = len(case.drafts) + 1
    logits = noise(7, count, VOCAB) if case.logits is None else np.tile(case.logits, (count, 1))
    drafts = np.array([case.drafts], np.int64).reshape(1, -1)
    assert_exact(graph, [case.request], logits[np.newaxis], drafts, [case.generated])


def test_distributions_of_a_mixed_batch(graph: AcceptanceGraph) -> None:
    rng = np.random.default_rng(11)

    def request() -> Request:
        pick = rng.random(8) < 0.5
        return Request(
            temperature=float(rng.uniform(0.5, 2)) if rng.random() < 0.9 else 0.0,
            top_k=int(rng.integers(1, 45)) if pick[0] else 0,
            top_p=float(rng.uniform(0.05, 1)) if pick[1] else 1.0,
            min_p=float(rng.uniform(0, 0.5)) if pick[2] else 0.0,
            presence_penalty=float(rng.uniform(-2, 2)) if pick[3] else 0.0,
            frequency_penalty=float(rng.uniform(-2, 2)) if pick[4] else 0.0,
            repetition_penalty=float(rng.uniform(0.5, 2)) if pick[5] else 1.0,
            prompt=tuple(rng.integers(0, VOCAB, 6).tolist()),
            logit_bias={int(t): float(rng.uniform(-5, 5)) for t in rng.integers(0, VOCAB, 3)}
            if pick[6]
            else None,
            allowed=rng.random(VOCAB) < 0.6 if pick[7] else None,
        )

    batch = 400
    assert_exact(
        graph,
        [request() for _ in range(batch)],
        noise(12, batch, 4, VOCAB, scale=3),
        rng.integers(-1, VOCAB, (batch, 3)),
        [rng.integers(0, VOCAB, rng.integers(0, 8)).tolist() for _ in range(batch)],
    )


tokens = st.integers(0, VOCAB - 1)


@st.composite
def requests(draw: st.DrawFn) -> Request:
    """Sampling parameters within their documented ranges."""
    allowed = draw(st.none() | st.sets(tokens, min_size=1))
    return Request(
        temperature=draw(st.just(0.0) | st.floats(0.2, 2)),
        top_k=draw(st.integers(-1, VOCAB + 2)),
        top_p=draw(st.floats(0, 1)),
        min_p=draw(st.floats(0, 1)),
        presence_penalty=draw(st.floats(-2, 2)),
        frequency_penalty=draw(st.floats(-2, 2)),
        repetition_penalty=draw(st.floats(0.5, 2)),
        prompt=tuple(draw(st.lists(tokens, max_size=8))),
        logit_bias=draw(st.none() | st.dictionaries(tokens, st.floats(-10, 10), max_size=5)),
        allowed=None if allowed is None else np.isin(np.arange(VOCAB), list(allowed)),
    )


def is_borderline(request: Request, logits: FloatArray, generated: Sequence[int]) -> bool:
    """Whether float32 may rightly keep other tokens than float64."""
    moved = logits + np.random.default_rng(0).normal(0, 1e-5, VOCAB)
    less = replace(request, top_p=request.top_p * (1 - 1e-5), min_p=request.min_p * (1 - 1e-5))
    more = replace(
        request,
        top_p=min(request.top_p * (1 + 1e-5), 1.0),
        min_p=min(request.min_p * (1 + 1e-5), 1.0),
    )
    kept = request.distribution(logits, generated) > 0
    return any(
        not np.array_equal(kept, nudged.distribution(scores, generated) > 0)
        for nudged, scores in ((request, moved), (less, logits), (more, logits))
    )


@settings(derandomize=True, deadline=None, max_examples=150)
@given(
    request=requests(),
    generated=st.lists(tokens, max_size=6),
    drafts=st.lists(st.integers(-1, VOCAB - 1), max_size=3),
    seed=st.integers(0, 2**32),
    scale=st.sampled_from([0.5, 2.0, 4.0]),
)
def test_any_distribution(
    graph: AcceptanceGraph,
    request: Request,
    generated: list[int],
    drafts: list[int],
    seed: int,
    scale: float,
) -> None:
    logits = noise(seed, len(drafts) + 1, VOCAB, scale=scale)
    for position, raw in enumerate(logits):
        before = [*generated, *(token for token in drafts[:position] if token >= 0)]
        assume(not is_borderline(request, raw.astype(np.float64), before))
    row = np.array([drafts], np.int64).reshape(1, -1)
    assert_exact(graph, [request], logits[np.newaxis], row, [generated])


# The draws


def draws(
    graph: AcceptanceGraph, seeds: Sequence[int], count: int, first: int = 0
) -> dict[Stream, FloatArray]:
    """The uniform numbers [B, count] at positions `first` and up."""
    outcome = graph.run(
        [Request().row(seed) for seed in seeds],
        np.zeros(VOCAB, np.float32),
        np.full((len(seeds), count - 1), -1),
        first_position=first,
    )
    return outcome.uniforms


@pytest.fixture(scope="session")
def uniforms(graph: AcceptanceGraph) -> dict[Stream, FloatArray]:
    """Draws of neighbouring seeds at neighbouring positions, 180,000 a stream."""
    return draws(graph, range(MAX_ROWS), 9)


@pytest.mark.parametrize("stream", Stream, ids=lambda stream: stream.name)
def test_draws_are_uniform(uniforms: dict[Stream, FloatArray], stream: Stream) -> None:
    values = uniforms[stream].ravel()
    assert values.min() >= 0
    assert values.max() < 1
    assert stats.kstest(values, "uniform").pvalue > P_VALUE


@pytest.mark.parametrize(
    ("first", "second"), list(itertools.combinations(Stream, 2)), ids=lambda stream: stream.name
)
def test_streams_are_independent(
    uniforms: dict[Stream, FloatArray], first: Stream, second: Stream
) -> None:
    assert grid_p_value(uniforms[first], uniforms[second]) > P_VALUE


@pytest.mark.parametrize("stream", Stream, ids=lambda stream: stream.name)
@pytest.mark.parametrize("lag", [1, 2, 8])
def test_positions_are_independent(
    uniforms: dict[Stream, FloatArray], stream: Stream, lag: int
) -> None:
    values = uniforms[stream]
    assert grid_p_value(values[:, :-lag], values[:, lag:]) > P_VALUE


@pytest.mark.parametrize("stream", Stream, ids=lambda stream: stream.name)
def test_seeds_are_independent(uniforms: dict[Stream, FloatArray], stream: Stream) -> None:
    values = uniforms[stream]
    assert grid_p_value(values[0::2], values[1::2]) > P_VALUE


def grid_p_value(first: FloatArray, second: FloatArray) -> float:
    """Chi-square of pairs on a 16 x 16 grid; no number is in two pairs of equal order."""
    cells = (first * 16).astype(np.int64) * 16 + (second * 16).astype(np.int64)
    return chi_square_p_value(np.bincount(cells.ravel(), minlength=256), np.full(256, 1 / 256))


def test_a_draw_depends_on_seed_and_position_only(graph: AcceptanceGraph) -> None:
    seeds = [0, 1, 2**32, 2**63, 2**64 - 1, 123_456_789]
    far = 100_000
    whole = draws(graph, seeds, 9, far)
    part = draws(graph, [7, *reversed(seeds)], 3, far + 5)
    for stream in Stream:
        np.testing.assert_array_equal(part[stream][:0:-1], whole[stream][:, 5:8])
        assert len(np.unique(whole[stream])) == whole[stream].size


@pytest.mark.parametrize("lead", [0.0, 8.0], ids=["flat", "peaked"])
def test_a_draw_inverts_the_distribution_of_a_large_vocabulary(
    graph: AcceptanceGraph, lead: float
) -> None:
    logits = noise(15, 128_000, scale=2.0).astype(np.float64)
    logits[5] = logits.max() + lead  # behind it, float32 sums would lose the small ones
    weights = np.exp(logits - logits.max()).astype(np.float32)
    below = np.append(0.0, weights.astype(np.float64).cumsum())
    below /= below[-1]
    rare = np.flatnonzero(np.diff(below) < 1e-7)[::500]
    # In the middle of tokens that a float32 sum would move, too.
    middles = (below[rare] + below[rare + 1]) / 2
    points = np.sort(np.concatenate([np.linspace(0, 1, 64, endpoint=False), middles]))
    drawn = graph.draw(weights, points)
    assert len(rare) > 10
    assert set(rare) <= set(drawn.tolist())
    assert (below[drawn] <= points + 1e-12).all()
    assert (points <= below[drawn + 1] + 1e-12).all()


def test_a_draw_never_takes_a_token_without_weight(graph: AcceptanceGraph) -> None:
    weights = np.array([0, 0, 1, 0, 3, 0, 0], np.float32)
    points = np.array([0, np.nextafter(0.25, 0), 0.25, np.nextafter(1, 0)])
    np.testing.assert_array_equal(graph.draw(weights, points), [2, 2, 4, 4])


# One step of each rule

REQUESTS = {
    "temperature": Request(temperature=0.7),
    "top_k": Request(temperature=1.3, top_k=7),
    "top_p": Request(top_p=0.8),
    "min_p": Request(min_p=0.1),
    "grammar": Request(allowed=THIRDS),
    "everything": Request(
        temperature=0.9,
        top_k=14,
        top_p=0.95,
        min_p=0.03,
        presence_penalty=0.6,
        frequency_penalty=0.3,
        repetition_penalty=1.2,
        prompt=(0, 1, 2, 3),
        logit_bias={5: 1.0, 6: -1.0},
        allowed=ODD,
    ),
    "greedy": Request(temperature=0.0),
}
"""A batch is an even mixture of these."""

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

LOSSLESS = ["matching", "rejection"]
LOSSY = ["naive", "relaxed", "synthetic"]


@dataclass(frozen=True)
class Experiment:
    """One step of many requests that differ in their seeds."""

    chosen: IntArray  # [N], index into REQUESTS
    verdicts: Mapping[str, Verdict]


def sample(law: FloatArray, uniform: FloatArray) -> IntArray:
    """Inverts the cumulative law [..., V] at uniform [...]; -1 where the law is zero."""
    cumulative = law.cumsum(axis=-1)
    point = uniform * cumulative[..., -1]
    token = np.asarray((cumulative <= point[..., np.newaxis]).sum(axis=-1), np.int64)
    return np.where(cumulative[..., -1] > 0, token, -1)


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


# Whole sequences


Propose = Callable[[IntArray, IntArray], tuple[IntArray, npt.NDArray[np.float32]]]
"""From the positions [B] and the last tokens [B]: drafts [B, K] and their laws [B, K, V]."""


def decode(
    graph: AcceptanceGraph,
    rule: str,
    requests: Sequence[Request],
    seeds: Sequence[int],
    table: npt.NDArray[np.float32],
    length: int,
    propose: Propose,
) -> IntArray:
    """Emits [B, length] tokens, step by step, from a target that reads the last token only.

    Args:
        graph: the compiled rules.
        rule: the one that decides.
        requests: one a row.
        seeds: one a row.
        table: [V, V], the target's logits after each token; all rows start behind token 0.
        length: tokens to emit.
        propose: the draft.
    """
    batch = len(requests)
    rows = [request.row(seed) for request, seed in zip(requests, seeds, strict=True)]
    done: list[list[int]] = [[] for _ in range(batch)]
    allowed = masks(requests)
    while min(len(tokens) for tokens in done) < length:
        position = np.array([len(tokens) for tokens in done])
        last = np.array([tokens[-1] if tokens else 0 for tokens in done])
        drafts, laws = propose(position, last)
        outcome = graph.run(
            rows,
            table[np.column_stack([last, drafts])],
            drafts,
            first_position=position,
            draft_probs=laws,
            allowed=allowed,
        )
        for row, tokens, emitted in zip(rows, done, outcome.verdicts[rule].emitted(), strict=True):
            tokens.extend(emitted)
            for token in emitted:
                row.count(token)
    return np.array([tokens[:length] for tokens in done])


def no_drafts(position: IntArray, last: IntArray) -> tuple[IntArray, npt.NDArray[np.float32]]:
    return np.zeros((len(last), 0), np.int64), np.zeros((len(last), 0, VOCAB), np.float32)


@pytest.mark.parametrize("k", [1, 3, 8])
def test_matching_emits_what_the_target_alone_samples(graph: AcceptanceGraph, k: int) -> None:
    batch, length = 84, 40
    rng = np.random.default_rng(50 + k)
    kinds = list(REQUESTS.values())
    requests = [kinds[row % len(kinds)] for row in range(batch)]
    seeds = rng.integers(0, 2**64, batch, dtype=np.uint64).tolist()
    table = noise(51, VOCAB, VOCAB)
    alone = decode(graph, "matching", requests, seeds, table, length, no_drafts)
    padded = np.pad(alone, ((0, 0), (0, k)), constant_values=-1)
    steps = 0

    def often_right(position: IntArray, last: IntArray) -> tuple[IntArray, npt.NDArray[np.float32]]:
        nonlocal steps
        steps += 1
        ahead = np.minimum(position[:, np.newaxis], length) + np.arange(k)
        right = np.take_along_axis(padded, ahead, axis=1)
        wrong = rng.integers(-1, VOCAB, right.shape)
        return np.where(rng.random(right.shape) < 0.8, right, wrong), np.zeros(
            (batch, k, VOCAB), np.float32
        )

    drafted = decode(graph, "matching", requests, seeds, table, length, often_right)
    np.testing.assert_array_equal(drafted, alone)
    assert steps < length


@pytest.mark.parametrize("rule", LOSSLESS)
def test_three_tokens_in_a_row_are_the_targets(graph: AcceptanceGraph, rule: str) -> None:
    batch, k = MAX_ROWS, 2
    request = REQUESTS["everything"]
    table = noise(61, VOCAB, VOCAB)
    laws = np.asarray(special.softmax(table + noise(62, VOCAB, VOCAB, scale=0.7), axis=-1))
    seeds = range(600_000, 600_000 + batch)
    coins = draws(graph, seeds, 8)[Stream.DRAFT]

    def follow(position: IntArray, last: IntArray) -> tuple[IntArray, npt.NDArray[np.float32]]:
        drafts, used = [], []
        for step in range(k):
            used.append(laws[last])
            coin = np.take_along_axis(coins, position[:, np.newaxis] + step, axis=1)[:, 0]
            last = sample(used[-1], coin)
            drafts.append(last)
        return np.stack(drafts, axis=1), np.stack(used, axis=1).astype(np.float32)

    emitted = decode(graph, rule, [request] * batch, seeds, table, 3, follow)
    law = np.zeros((VOCAB, VOCAB, VOCAB))
    first = request.distribution(table[0])
    for a in np.flatnonzero(first).tolist():
        second = request.distribution(table[a], [a])
        for b in np.flatnonzero(second).tolist():
            law[a, b] = first[a] * second[b] * request.distribution(table[b], [a, b])
    counts = np.zeros_like(law)
    np.add.at(counts, tuple(emitted.T), 1)
    assert chi_square_p_value(counts.ravel(), law.ravel()) > P_VALUE


# The rules that say they are lossy


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
