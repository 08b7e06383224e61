"""What must hold of the acceptance rules on any device, see `acceptance_graph`."""

from __future__ import annotations

import numpy as np
from acceptance_graph import MAX_ROWS, VOCAB, AcceptanceGraph, Request, masks
from reference.chi_square import chi_square_p_value
from reference.philox import numbers
from scipy import special

from unispec.sampling.seeds import Stream

__all__ = ["ALL_PARAMETERS", "check_laws", "check_numbers", "rule_p_values"]

ALL_PARAMETERS = Request(
    temperature=0.9,
    top_k=14,
    top_p=0.95,
    min_p=0.03,
    presence_penalty=0.6,
    frequency_penalty=0.3,
    repetition_penalty=1.2,
    prompt=(0, 1, 2, 3),
    logit_bias={5: 1.0, 6: -1.0},
    allowed=np.arange(VOCAB) % 2 == 1,
)
"""Whatever changes a law, at once."""

REQUESTS = (
    Request(),
    Request(temperature=0.0),
    Request(temperature=1.3, top_k=7),
    Request(top_p=0.8),
    Request(min_p=0.1),
    Request(allowed=np.arange(VOCAB) % 3 != 0),
    ALL_PARAMETERS,
)


def check_laws(graph: AcceptanceGraph) -> None:
    """Asserts that the graph's distributions are the exact ones, at every position."""
    rng, k = np.random.default_rng(5), 3
    logits = rng.normal(0, 1.5, (len(REQUESTS), k + 1, VOCAB)).astype(np.float32)
    drafts = rng.integers(0, VOCAB, (len(REQUESTS), k))
    rows = [request.row(seed=0) for request in REQUESTS]
    found = graph.run(rows, logits, drafts, allowed=masks(REQUESTS)).probs
    for request, *of_row in zip(REQUESTS, logits, drafts.tolist(), found, strict=True):
        for position, (raw, law) in enumerate(zip(of_row[0], of_row[2], strict=True)):
            expected = request.distribution(raw, of_row[1][:position])
            np.testing.assert_allclose(law, expected, rtol=1e-4, atol=1e-7)


def check_numbers(graph: AcceptanceGraph) -> None:
    """Asserts that random numbers are those of Philox, to the last bit."""
    seeds, count, first = [0, 1, 2**40 + 3, 2**64 - 1], 9, 2**20
    found = graph.run(
        [Request().row(seed) for seed in seeds],
        np.zeros(VOCAB, np.float32),
        np.full((len(seeds), count - 1), -1),
        first_position=first,
    ).uniforms
    where = first + np.arange(count)
    for stream in Stream:
        expected = [numbers(seed, where, stream) for seed in seeds]
        np.testing.assert_array_equal(found[stream], expected)


def rule_p_values(graph: AcceptanceGraph, rule: str) -> tuple[float, float]:
    """How likely a right rule emits first and second tokens as far from the target's law as this.

    Drafts are drawn from laws that are near the target's and not the same.

    Args:
        rule: a name of `acceptance_graph.RULES`.
    """
    rng, k = np.random.default_rng(6), 2
    request = Request(temperature=1.2, top_p=0.9)
    logits = rng.normal(0, 3, (k + 1, VOCAB)).astype(np.float32)
    laws = special.softmax(logits[:k] / 1.2 + rng.normal(0, 0.7, (k, VOCAB)), axis=-1)
    drafts = np.stack([rng.choice(VOCAB, MAX_ROWS, p=law) for law in laws], axis=1)
    emitted = (
        graph.run(
            [request.row(seed) for seed in range(MAX_ROWS)],
            logits,
            drafts,
            draft_probs=laws.astype(np.float32),
        )
        .verdicts[rule]
        .emitted()
    )
    # Logits depend on no draft, so the second token has the same law after every first one.
    first, second = (
        np.bincount([row[at] for row in emitted if len(row) > at], minlength=VOCAB)
        for at in range(2)
    )
    return (
        chi_square_p_value(first, request.distribution(logits[0])),
        chi_square_p_value(second, request.distribution(logits[1])),
    )
