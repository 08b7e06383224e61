"""Whole sequences of steps are what the target alone samples."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt
import pytest
from acceptance_graph import MAX_ROWS, VOCAB, AcceptanceGraph, Request, masks
from acceptance_laws import LOSSLESS, P_VALUE, REQUESTS, IntArray, draws, noise, sample
from reference.chi_square import chi_square_p_value
from scipy import special

from unispec.sampling.seeds import Stream

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
