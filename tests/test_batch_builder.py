"""What the graph is given of each request: the inputs of a step, without a graph."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest
from max.driver import CPU, Buffer
from max.pipelines.context import EOSTracker, SamplingParams, TextContext, TokenBuffer

from unispec.pipelines.runtime.batch import BatchBuilder
from unispec.pipelines.runtime.draft_probs import DraftProbs
from unispec.pipelines.runtime.rows import Row

VOCAB = 70
"""Not a multiple of the 32 tokens of a mask's word."""
ENDS = (2, 40, 69)
K = 4


def builder(*, sampled_drafts: bool = False) -> BatchBuilder:
    return BatchBuilder(
        max_batch_size=4,
        max_batch_input_tokens=32,
        vocab_size=VOCAB,
        most_verified=K,
        num_speculative_tokens=K,
        device=CPU(),
        sampled_drafts=sampled_drafts,
    )


def request(min_new_tokens: int = 0) -> TextContext:
    return TextContext(
        max_length=64,
        tokens=TokenBuffer(np.array([5, 6, 7], np.int64)),
        eos_tracker=EOSTracker(eos_token_ids=set(ENDS)),
        sampling_params=SamplingParams(temperature=0, min_new_tokens=min_new_tokens),
    )


def drafting(batch: BatchBuilder, context: TextContext, drafts: int, *, generated: int = 1) -> Row:
    """The row of a request that has so many drafts to verify."""
    row = batch.row(context)
    row.drafts = list(range(10, 10 + drafts))
    row.generated = generated
    return row


def allowed(mask: np.ndarray) -> np.ndarray:  # type: ignore[type-arg]
    """Which tokens, bool ``[..., V]``, by the definition: bit t % 32 of word t // 32."""
    tokens = np.arange(VOCAB)
    return (mask.view(np.uint32)[..., tokens // 32] >> (tokens % 32).astype(np.uint32)) & 1 == 1


@pytest.mark.parametrize("drafts", range(K + 1))
@pytest.mark.parametrize("generated", [0, 1, 5])
def test_the_end_is_banned_at_each_position_before_min_new_tokens(
    drafts: int, generated: int
) -> None:
    """The token at position j is the answer's number ``generated + j + 1``."""
    for least in range(generated + drafts + 4):
        batch, context = builder(), request(least)
        drafting(batch, context, drafts, generated=generated)
        mask = allowed(batch.fields([context])["token_bitmask"].to_numpy())
        assert mask.shape == (1, drafts + 1, VOCAB)
        others = np.setdiff1d(np.arange(VOCAB), ENDS)
        assert mask[:, :, others].all()
        for position in range(drafts + 1):
            may_end = generated + position >= least
            assert (mask[0, position, list(ENDS)] == may_end).all()


def test_only_rows_that_may_not_end_are_masked() -> None:
    """Of rows with more and fewer drafts, each by its own count."""
    batch = builder()
    short, free, long = request(2), request(), request(9)
    drafting(batch, short, 1)
    drafting(batch, free, 3)
    drafting(batch, long, 2, generated=7)
    mask = allowed(batch.fields([short, free, long])["token_bitmask"].to_numpy())
    ends = mask[:, :, list(ENDS)].all(-1)
    assert ends.tolist() == [
        [False, True, True, True],
        [True, True, True, True],
        [False, False, True, True],
    ]


def test_an_ignored_end_is_banned_as_long_as_another_token_is_allowed() -> None:
    """Under a grammar that allows ends and a stop token, a letter, and the ends alone."""
    batch, context = builder(), request()
    row = drafting(batch, context, 0)
    row.ignored_eos = frozenset({2, 40})
    for tokens, left in (((2, 40, 69), [69]), ((2, 5), [5]), ((2, 40), [2, 40])):
        row.grammar = Allows(tokens)  # type: ignore[assignment]
        mask = allowed(batch.fields([context])["token_bitmask"].to_numpy())
        assert np.flatnonzero(mask[0, 0]).tolist() == left


class Allows:
    """In place of a grammar: some tokens, at every position."""

    def __init__(self, tokens: tuple[int, ...]) -> None:
        self._tokens = list(tokens)

    def fill_bitmask(self, bitmask: npt.NDArray[np.int32], drafts: object) -> None:
        bits = np.zeros(bitmask.shape[-1] * 32, np.bool_)
        bits[self._tokens] = True
        bitmask[...] = np.packbits(bits, bitorder="little").view(np.int32)


def test_drafts_of_different_lengths_in_one_step() -> None:
    """As after a change of K: the shorter ones are void behind their end, and so is their q."""
    batch = builder(sampled_drafts=True)
    contexts = [request() for _ in range(4)]
    random = np.random.default_rng(3)
    q = [random.random((count, VOCAB), np.float32) for count in (K, 2, 3)]
    for context, probs, count in zip(contexts, q, (K, 2, 1), strict=False):
        drafting(batch, context, count).draft_probs = DraftProbs(Buffer.from_numpy(probs[None]), 0)
    fields = batch.fields(contexts)
    drafts, probs = fields["draft_tokens"].to_numpy(), fields["draft_probs_full"].to_numpy()
    assert drafts.tolist() == [[10, 11, 12, 13], [10, 11, -1, -1], [10, -1, -1, -1], [-1] * 4]
    expected = np.zeros((4, K, VOCAB), np.float32)
    expected[0], expected[1, :2], expected[2, :1] = q[0], q[1], q[2][:1]
    np.testing.assert_array_equal(probs, expected)
