"""The target's distribution after penalties, bias, temperature and truncation is exact."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import pytest
from acceptance_graph import VOCAB, AcceptanceGraph, Request, masks
from acceptance_laws import ODD, THIRDS, FloatArray, IntArray, noise
from hypothesis import assume, given, settings
from hypothesis import strategies as st


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
