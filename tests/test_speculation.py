"""Whose proposals a row verifies, and how many, decided without a model."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import numpy as np
import pytest
from max.pipelines.context import EOSTracker, SamplingParams, TextContext, TokenBuffer

from unispec.pipelines.lookup.options import LookupOptions
from unispec.pipelines.policy.costs import StepCost, StepCosts
from unispec.pipelines.runtime.rows import Row, make_row
from unispec.pipelines.runtime.speculation import Speculation

VOCABULARY = 1000
STEP_S = 0.010


def costs(draft_s: float, proposal_s: float, widest: int, most: int) -> StepCosts:
    """Each verified draft and each proposal takes so long more."""
    verify = STEP_S + draft_s * np.arange(widest + 1)
    return StepCosts({(1, 100): StepCost(verify, proposal_s * np.arange(most + 1.0))})


class Asked:
    """One request, whose answer a test writes."""

    def __init__(self, prompt: Sequence[int]) -> None:
        sampling = SamplingParams(max_new_tokens=500)
        self.context = TextContext(
            max_length=2000,
            tokens=TokenBuffer(np.array(prompt, np.int64)),
            eos_tracker=EOSTracker(),
            sampling_params=sampling,
        )
        self.row: Row = make_row(sampling, prompt, VOCABULARY)

    def step(
        self,
        speculation: Speculation,
        emitted: Sequence[int],
        proposed: Sequence[int] = (),
        *,
        right: bool = False,
    ) -> tuple[list[int], int]:
        """Plans a step and takes what it brought; the drafts that it verified, and K.

        Where they are right, they stand before what is emitted.
        """
        count = speculation.plan([self.context], [self.row])
        verified = self.row.drafts
        if right:
            emitted = [*verified, *emitted]
        for token in emitted:
            self.context.advance_token_buffer(token)
            self.row.emit(token)
        speculation.learn(self.row, emitted)
        self.row.drafts = list(proposed[:count])
        return verified, count


def pinned(count: int, *, most: int, lookup: LookupOptions | None = None) -> Speculation:
    return Speculation(
        most_verified=8, most_proposed=most, pinned=lambda rows: count, lookup=lookup
    )


def choosing() -> Speculation:
    """A millisecond a draft, verified or proposed."""
    times = costs(0.001, 0.001, widest=4, most=4)
    return Speculation(most_verified=4, most_proposed=4, pinned=None, costs=times)


def test_a_pinned_number_is_proposed_and_verified() -> None:
    speculation, one = pinned(3, most=8), Asked([1, 2, 3])
    assert one.step(speculation, [10], [11, 12, 13, 14]) == ([], 3)
    assert one.step(speculation, [11, 12, 50], [1, 2, 3]) == ([11, 12, 13], 3)
    assert one.row.speculation is not None
    assert one.row.speculation.acceptance["draft"].totals == (3, 2)
    assert one.row.speculation.acceptance["ngram"].totals == (0, 0)


def test_what_followed_the_same_tokens_is_verified() -> None:
    speculation = pinned(3, most=0, lookup=LookupOptions(2, 8))
    one = Asked([1, 2, 3, 4, 5, 6, 7, 9])
    assert one.step(speculation, [2]) == ([], 0)
    # 2 alone is shorter than two tokens.
    assert one.step(speculation, [3]) == ([], 0)
    assert one.step(speculation, [4, 5, 8]) == ([4, 5, 6], 0)
    assert one.row.speculation is not None
    assert one.row.speculation.acceptance["ngram"].totals == (3, 2)


def test_a_prompt_is_looked_into_as_far_as_it_was_read() -> None:
    speculation = pinned(3, most=0, lookup=LookupOptions(2, 8))
    one = Asked([1, 2, 3, 4, 5, 6])
    one.context.tokens.chunk(4)
    speculation.plan([one.context], [one.row])
    assert one.row.speculation is not None
    assert one.row.speculation.automaton.tokens == [1, 2, 3, 4]
    one.context.tokens.advance_chunk()
    speculation.plan([one.context], [one.row])
    assert one.row.speculation.automaton.tokens == [1, 2, 3, 4, 5, 6]


def test_a_good_match_goes_before_a_bad_draft_and_the_other_way_round() -> None:
    speculation = pinned(2, most=8, lookup=LookupOptions(2, 8))
    loop = Asked([1, 2, 3, 4] * 8)
    loop.step(speculation, [1], [500, 500])
    verified = []
    for at in range(1, 60):
        verified, _ = loop.step(speculation, [(at % 4) + 1], [500, 500])
    assert verified == [4, 1]
    # Of another request, whose matches are never right and whose draft is.
    other = Asked([7, 8, 9, 10] * 8)
    other.step(speculation, [7], [7, 8])
    for _ in range(60):
        verified, _ = other.step(speculation, [7, 8], [7, 8])
        other.row.drafts = [7, 8]
    assert verified == [7, 8]


def test_a_request_is_answered_by_its_own_text_alone() -> None:
    speculation = pinned(3, most=0, lookup=LookupOptions(2, 8))
    first, second = Asked([1, 2, 3, 4, 5]), Asked([7, 1, 2])
    first.step(speculation, [9])
    second.step(speculation, [3])
    assert second.step(speculation, [4]) == ([], 0)
    speculation.finished(first.context, first.row)
    assert second.step(speculation, [5]) == ([], 0)


def test_with_a_store_finished_answers_are_looked_up_too() -> None:
    speculation = pinned(3, most=0, lookup=LookupOptions(2, 8, stored=100))
    first, second, third = Asked([19, 20]), Asked([7]), Asked([19])
    for token in (21, 22, 23, 24, 25, 26):
        first.step(speculation, [token])
    first.step(speculation, [27])
    speculation.finished(first.context, first.row)
    for token in (21, 22, 23):
        assert second.step(speculation, [token]) == ([], 0)
    assert second.step(speculation, [24]) == ([], 0)
    # Up to the answer's last token.
    assert second.step(speculation, [25, 26, 27]) == ([25, 26, 27], 0)
    # What is the prompt's is not told to others.
    for token in (20, 21, 22, 23):
        assert third.step(speculation, [token]) == ([], 0)


def test_what_a_preempted_request_reads_anew_is_not_verified() -> None:
    speculation = pinned(3, most=0, lookup=LookupOptions(2, 8))
    one = Asked([1, 2, 3, 4] * 3)
    for token in (1, 2, 3):
        one.step(speculation, [token])
    one.context.tokens.reset_as_new_prompt()
    one.context.tokens.chunk(5)
    speculation.plan([one.context], [one.row])
    assert one.row.drafts == []
    one.context.tokens.advance_chunk()
    speculation.plan([one.context], [one.row])
    assert one.row.drafts == []
    speculation.learn(one.row, [4])
    one.context.advance_token_buffer(4)
    speculation.plan([one.context], [one.row])
    assert one.row.drafts == [1, 2, 3]


def test_nothing_is_verified_behind_the_longest_answer() -> None:
    speculation = pinned(3, most=0, lookup=LookupOptions(2, 8))
    one = Asked([1, 2, 3, 4] * 3)
    one.context.max_length = 16
    assert one.step(speculation, [1]) == ([], 0)
    assert one.step(speculation, [2]) == ([2, 3], 0)
    assert one.step(speculation, [3]) == ([3], 0)
    assert one.step(speculation, [4]) == ([], 0)


def test_nothing_is_proposed_behind_the_longest_answer() -> None:
    speculation = choosing()
    one = Asked([1, 2])
    one.step(speculation, [3], [4, 5, 6, 7])
    for _ in range(100):
        one.step(speculation, [*one.row.drafts, 3], [4, 5, 6, 7])
    one.context.max_length = len(one.context.tokens) + 8
    assert one.step(speculation, [4, 5, 6, 7, 3], [4, 5, 6, 7]) == ([4, 5, 6, 7], 4)
    assert one.step(speculation, [4], [5, 6, 7, 8]) == ([4, 5], 4)
    assert one.step(speculation, [5], [6, 7, 8, 9]) == ([5], 4)
    assert one.step(speculation, [6], [7, 8, 9]) == ([], 0)


@pytest.mark.parametrize(
    ("options", "agreeing", "found"),
    [
        # Its own matches of 4 to 7 tokens are too short, and no reason not to ask the store.
        (LookupOptions(8, 16, stored=100), 8, True),
        (LookupOptions(8, 16, stored=100), 7, False),
        # No more tokens are compared than are asked for.
        (LookupOptions(2, 3, stored=100), 3, True),
        (LookupOptions(2, 3, stored=100), 2, False),
    ],
)
def test_a_store_is_asked_for_as_long_a_match_as_is_wanted(
    options: LookupOptions, agreeing: int, found: bool
) -> None:
    speculation = pinned(3, most=0, lookup=options)
    first = Asked([900])
    for token in range(20, 31):
        first.step(speculation, [token])
    speculation.finished(first.context, first.row)
    begin = list(range(20, 29))[-agreeing:]
    # Its own text has the last ones, too few, with something else behind them.
    own = begin[-5:] if agreeing > 4 else begin[-1:]
    second = Asked([*own, 777, *begin[:-1]])
    assert second.step(speculation, [begin[-1]]) == ([], 0)
    verified, _ = second.step(speculation, [29, 30])
    assert verified == ([29, 30] if found else [])


def test_a_draft_that_pays_is_asked_for_more_and_one_that_does_not_is_left_alone() -> None:
    speculation = choosing()
    good = Asked([1, 2])
    good.step(speculation, [3], [4, 5, 6, 7])
    for _ in range(100):
        good.step(speculation, [*good.row.drafts, 3], [4, 5, 6, 7])
    verified, count = good.step(speculation, [4, 5, 6, 7, 3], [4, 5, 6, 7])
    assert (len(verified), count) == (4, 4)

    bad = Asked([1, 2])
    counts = [bad.step(speculation, [3], [9, 9, 9, 9])[1] for _ in range(200)]
    assert counts[0] > 0
    # One in 32 sees whether it is right by now.
    assert counts[-64:].count(0) >= 61
    assert 1 <= 64 - counts[-64:].count(0) <= 3


def test_where_it_could_not_pay_nothing_is_proposed_to_see_whether_it_does() -> None:
    # Two tokens in 20.1 ms are less than one in 10.
    times = costs(0.0091, 0.001, widest=4, most=4)
    speculation = Speculation(most_verified=4, most_proposed=4, pinned=None, costs=times)
    one = Asked([1, 2])
    counts = [one.step(speculation, [*one.row.drafts[at % 2 :], 3], [9])[1] for at in range(450)]
    # At first it is looked at all the same, to say whether it is of any use.
    assert sum(counts) > 30
    assert counts[-64:] == [0] * 64


def test_a_draft_becomes_right_where_one_that_fails_half_as_often_would_not_pay() -> None:
    """1.0 tokens in 15.5 ms, and 1.5, are less than one in 10; 2 are more."""
    times = costs(0.0045, 0.001, widest=4, most=4)
    speculation = Speculation(most_verified=4, most_proposed=4, pinned=None, costs=times)

    def answer(right: bool) -> list[int]:
        one = Asked([1, 2])
        return [
            one.step(speculation, [3], [3 if right else 4] * 4, right=right)[1] for _ in range(400)
        ]

    for _ in range(3):
        answer(right=False)
    assert speculation.choice is not None
    assert not speculation.choice.one_more_could_pay
    found = [count for _ in range(30) for count in answer(right=True)]
    assert any(found[:1024])
    assert all(found[-20:])


def test_nothing_is_proposed_that_nobody_takes() -> None:
    """For a chunk that is not the prompt's last, whether K is chosen or given."""
    for speculation in (choosing(), pinned(3, most=8)):
        one = Asked(list(range(1, 9)))
        one.context.tokens.chunk(4)
        assert speculation.plan([one.context], [one.row]) == 0
        one.context.tokens.advance_chunk()
        assert speculation.plan([one.context], [one.row]) > 0


def test_a_draft_that_becomes_right_is_found_out() -> None:
    speculation = choosing()
    one = Asked([1, 2])
    for _ in range(100):
        one.step(speculation, [3], [9, 9, 9, 9])
    steps = 0
    while steps < 400 and one.step(speculation, [*one.row.drafts, 3], [4, 5, 6, 7])[1] < 2:
        steps += 1
    assert steps < 400


def test_where_drafts_cost_too_much_none_is_verified() -> None:
    speculation = Speculation(
        most_verified=4,
        most_proposed=0,
        pinned=None,
        lookup=LookupOptions(2, 8),
        # Each draft takes as long as a whole step: even a sure one is worth nothing.
        costs=costs(STEP_S, 0.0, widest=4, most=0),
    )
    loop = Asked([1, 2, 3, 4] * 4)
    verified = [loop.step(speculation, [(at % 4) + 1])[0] for at in range(50)]
    assert verified == [[]] * 50
    assert speculation.choice is not None
    assert speculation.choice.rates[0] == pytest.approx(1 / STEP_S)


@pytest.mark.parametrize("chosen", [False, True])
def test_a_useless_draft_is_said_once(caplog: pytest.LogCaptureFixture, chosen: bool) -> None:
    speculation, one = pinned(2, most=2), Asked([1, 2])
    if chosen:
        speculation = choosing()
    with caplog.at_level(logging.WARNING):
        for _ in range(400):
            one.step(speculation, [3], [9, 9])
    (record,) = caplog.records
    assert "0.0% came true" in record.getMessage()
    assert "trained for this target" in record.getMessage()


def test_a_draft_that_was_right_is_not_called_useless_for_a_hard_passage(
    caplog: pytest.LogCaptureFixture,
) -> None:
    speculation, one = pinned(1, most=2), Asked([1, 2])
    with caplog.at_level(logging.WARNING):
        for _ in range(100):
            one.step(speculation, [9, 3], [9])
        for _ in range(700):
            one.step(speculation, [3], [9])
    assert not caplog.records


def test_a_draft_that_is_sometimes_right_is_not_called_useless(
    caplog: pytest.LogCaptureFixture,
) -> None:
    speculation, one = pinned(1, most=2), Asked([1, 2])
    with caplog.at_level(logging.WARNING):
        for at in range(400):
            one.step(speculation, [9, 3] if at % 10 == 0 else [3], [9])
    assert not caplog.records
