"""What is chosen for a step, against sums that are done by hand or by trying everything."""

from __future__ import annotations

import json
from itertools import product
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from unispec.pipelines.policy.choosing import GoingRate, RowOutlook, best_choice
from unispec.pipelines.policy.costs import StepCost, StepCosts
from unispec.pipelines.policy.estimates import DraftEstimate, MatchEstimate, agreement

HUGE = json.dumps([{"rows": 1, "context": 1, "verify_s": [10**400], "propose_s": [0]}])
"""A number that no float holds."""


def cost(verify: list[float], propose: list[float]) -> StepCost:
    return StepCost(np.array(verify), np.array(propose))


def test_costs_between_measured_ones_are_on_the_line() -> None:
    costs = StepCosts(
        {
            (1, 100): cost([1.0, 2.0], [0.0, 0.5]),
            (1, 300): cost([3.0, 5.0], [0.0, 0.7]),
            (4, 100): cost([2.0, 6.0], [0.0, 0.5]),
            (4, 300): cost([6.0, 9.0], [0.0, 1.1]),
        }
    )
    assert costs.at(1, 100).verify.tolist() == [1.0, 2.0]
    assert costs.at(1, 200).verify.tolist() == [2.0, 3.5]
    # A third of the way from 1 to 4 rows: 2.0 to 4.0, and 3.5 to 7.5.
    assert costs.at(2, 200).verify == pytest.approx([2.0 + 2.0 / 3, 3.5 + 4.0 / 3])
    assert costs.at(2, 300).propose == pytest.approx([0.0, 0.7 + 0.4 / 3])
    # Longer than measured: the line goes on; shorter or fewer: it ends.
    assert costs.at(1, 400).verify.tolist() == [4.0, 6.5]
    assert costs.at(1, 10).verify.tolist() == [1.0, 2.0]


def test_more_work_never_takes_less_time() -> None:
    costs = StepCosts(
        {
            (1, 10): cost([1.0, 0.9, 2.0], [0.0, 0.3, 0.2]),
            (1, 50): cost([0.8, 1.5, 1.5], [0.0, 0.1, 0.4]),
            (2, 10): cost([0.5, 1.0, 3.0], [0.0, 0.3, 0.3]),
            (2, 50): cost([2.0, 2.0, 2.0], [0.0, 0.3, 0.3]),
        }
    )
    assert costs.at(1, 10).verify.tolist() == [1.0, 1.0, 2.0]
    assert costs.at(1, 10).propose.tolist() == [0.0, 0.3, 0.3]
    assert costs.at(1, 50).verify.tolist() == [1.0, 1.5, 2.0]
    assert costs.at(2, 10).verify.tolist() == [1.0, 1.0, 3.0]
    assert costs.at(2, 50).verify.tolist() == [2.0, 2.0, 3.0]


def test_beyond_what_was_measured_more_work_takes_no_less_time_either() -> None:
    # The lines of both widths cross at 500 tokens: 1.0 and 1.1, then 3.0 and 3.0, then 5.0 and 4.9.
    costs = StepCosts(
        {
            (1, 100): cost([1.0, 1.1], [0.0, 0.2]),
            (1, 300): cost([3.0, 3.0], [0.0, 0.1]),
        }
    )
    assert costs.at(1, 500).verify.tolist() == [5.0, 5.0]
    assert costs.at(1, 500).propose.tolist() == [0.0, 0.2]


def test_costs_are_written_and_read(tmp_path: Path) -> None:
    path = tmp_path / "new folder" / "costs.json"
    StepCosts({(1, 100): cost([1.25, 2.5], [0.0, 0.5])}).save(path)
    found = StepCosts.read(path)
    assert found is not None
    assert found.at(1, 100).verify.tolist() == [1.25, 2.5]
    assert found.at(1, 100).propose.tolist() == [0.0, 0.5]


@pytest.mark.parametrize("text", ["", "{", "[1]", '[{"rows": 1}]', "null", "[]", HUGE])
def test_a_damaged_file_is_no_table(tmp_path: Path, text: str) -> None:
    path = tmp_path / "costs.json"
    path.write_text(text)
    assert StepCosts.read(path) is None


def test_of_proposals_what_the_answer_has_in_their_place_counts() -> None:
    assert agreement([1, 2, 3], [1, 2, 3, 4]) == (3, False)
    assert agreement([1, 2, 3], [1, 9]) == (1, True)
    # One was verified; that the second is right is known all the same.
    assert agreement([1, 2, 3], [1, 2]) == (2, False)
    assert agreement([5], [1]) == (0, True)
    assert agreement([], [1]) == (0, False)


def test_an_estimate_comes_near_to_what_happens() -> None:
    shared = DraftEstimate()
    row = DraftEstimate(shared)
    for _ in range(300):
        row.observe([1, 2], [1, 9])
    none, first, second = row.expected(2)
    assert none == 0.0
    assert first == pytest.approx(1.0, abs=0.02)
    # The second one is never right.
    assert second == pytest.approx(first, abs=0.02)
    # A new request begins with what others taught.
    assert DraftEstimate(shared).expected(2)[1] == pytest.approx(1.0, abs=0.02)


def test_an_estimate_follows_a_change_within_a_row() -> None:
    row = DraftEstimate(DraftEstimate())
    for _ in range(100):
        row.observe([1], [1])
    for _ in range(30):
        row.observe([1], [2])
    assert row.expected(1)[1] < 0.35


def test_longer_matches_are_judged_by_themselves() -> None:
    matches = MatchEstimate()
    for _ in range(200):
        matches.observe(2, [1], [9])
        matches.observe(12, [1, 2], [1, 2, 3])
    assert matches.expected(2, 1)[1] < 0.05
    assert matches.expected(12, 2)[2] == pytest.approx(2.0, abs=0.1)
    # The second token of a short match's continuation is in a class of its own.
    assert matches.expected(2, 2)[2] - matches.expected(2, 2)[1] < 0.03


def test_a_draft_that_pays_is_used_and_one_that_does_not_is_not() -> None:
    # A step of 10 ms, each draft 2 ms more, proposing takes 1 ms a token.
    times = cost([10, 12, 14], [0, 1, 2])
    right = RowOutlook([0.0, 0.8, 1.4], [0.0, 0.8, 1.4])
    choice = best_choice([right], times)
    # 1 / 10, 1.8 / 13, 2.4 / 16: two drafts are best.
    assert (choice.width, choice.proposals) == (2, 2)
    assert choice.rates == pytest.approx([1 / 10, 1.8 / 13, 2.4 / 16])
    # 1.3 / 13 is what the target makes alone: at a little less it runs alone.
    wrong = RowOutlook([0.0, 0.0, 0.0], [0.0, 0.29, 0.3])
    choice = best_choice([wrong], times)
    assert (choice.width, choice.proposals) == (0, 0)


def test_a_draft_at_hand_is_verified_for_less_than_a_new_one_is_proposed_for() -> None:
    # 0.29 tokens for 2 ms, where 10 ms make one; proposing it would have taken 1 ms more.
    row = RowOutlook([0.0, 0.29], [0.0, 0.29])
    choice = best_choice([row], cost([10, 12], [0, 1]))
    assert (choice.width, choice.proposals) == (1, 0)


@pytest.mark.parametrize(
    ("verify", "proposed", "rows", "better", "right"),
    [
        # Half as many failures: 1.5 tokens in 13 ms are more than 1 in 10.
        ([10, 12, 14], [0.0, 0.0, 0.0], 1, True, True),
        # 1.75 in 19.5 are less, 2 are more; and 2 in 21 are less.
        ([10, 18.5, 30], [0.0, 0.5, 0.5], 1, False, True),
        ([10, 20, 30], [0.0, 0.5, 0.5], 1, False, False),
        # One pays already: 1.9 in 13. The second comes true 0.3 of 0.9 times; 2.5 in 16 are more,
        # 2.5 in 20 are not, nor are 2.8.
        ([10, 12, 14], [0.0, 0.9, 1.2], 1, True, True),
        ([10, 12, 18], [0.0, 0.9, 1.2], 1, False, False),
        # Rows add up: 2 + 2 * 0.75 in 20 are less than 2 in 10, and 2 + 2 are no more.
        ([10, 19, 28], [0.0, 0.5, 0.5], 2, False, False),
        ([10, 12, 14], [0.0, 0.9, 1.7], 1, False, False),  # there is none more
    ],
)
def test_whether_one_more_could_pay(
    verify: list[float], proposed: list[float], rows: int, better: bool, right: bool
) -> None:
    row = RowOutlook([0.0, 0.0, 0.0], proposed)
    choice = best_choice([row] * rows, cost(verify, [0, 1, 2]))
    assert (choice.one_more_could_pay, choice.one_more_right_would_pay) == (better, right)


def test_what_is_at_hand_is_verified_though_nothing_more_is_proposed() -> None:
    # A match is at hand, the draft proposes nothing of use.
    row = RowOutlook([0.0, 0.9, 1.7], [0.0, 0.0, 0.0], [0.0, 0.9, 1.7], 0.9)
    choice = best_choice([row], cost([10, 11, 12], [0, 2, 3]))
    assert (choice.width, choice.proposals) == (2, 0)


@given(
    st.lists(st.floats(0.0, 1.0), min_size=4, max_size=4),
    st.lists(st.floats(0.0, 1.0), min_size=2, max_size=2),
    st.floats(0.0, 1.0),
    st.integers(8, 20),
)
@settings(max_examples=100, deadline=None)
def test_many_rows_are_decided_as_one_is(
    match: list[float], draft: list[float], share: float, rows: int
) -> None:
    """Rows alike bring as many times as much; from 8 on it is computed in another way."""
    times = cost([10, 11, 12, 14, 17], [0, 1, 2])
    matched, proposed = ([0.0, *np.cumsum(chances).tolist()] for chances in (match, draft))
    row = RowOutlook(matched, proposed, matched, share)
    one, many = best_choice([row], times), best_choice([row] * rows, times)
    assert many.rates == pytest.approx([rows * rate for rate in one.rates])
    by_hand = max(
        (1 + proposed[used] + share * max(matched[width] - proposed[used], 0))
        / (times.verify[width] + times.propose[count])
        for count, width in product(range(3), range(5))
        for used in [min(count, width)]
    )
    assert max(one.rates) == pytest.approx(by_hand)


def test_rows_decide_together() -> None:
    times = cost([10, 14], [0, 1])
    good, bad = RowOutlook([0.0, 1.0], [0.0, 1.0]), RowOutlook([0.0, 0.0], [0.0, 0.0])
    # (2 + 1) / 15 is no more than 2 / 10.
    assert best_choice([good, bad], times).proposals == 0
    assert best_choice([good, good], times).proposals == 1


def test_a_second_is_worth_what_the_last_steps_brought() -> None:
    going = GoingRate()
    assert going.value(1, 0.25, 10.0) == pytest.approx(0.25)
    for _ in range(200):
        going.after(1, 4, 12.0)
    # 20 steps count (a decay of 0.95), and 4 of the guess.
    assert going.value(1, 0.1, 10.0) == pytest.approx(84 / 280, rel=1e-4)
    # Another batch is priced anew.
    assert going.value(2, 0.2, 10.0) == pytest.approx(0.2)


def test_what_brings_less_than_time_is_worth_by_now_is_not_verified() -> None:
    # A match: the first drafts are nearly sure, the last ones are not; 2 ms a draft.
    row = RowOutlook([0.0, 0.95, 1.85, 2.3, 2.6], [0.0])
    times = cost([10, 12, 14, 16, 18], [0])
    # A token for 10 ms is what the target alone makes: 0.3 for 2 ms are more.
    assert best_choice([row], times).width == 4
    going = GoingRate()
    for _ in range(100):
        going.after(1, 3, 13.0)
    # Where 13 ms bring 3 tokens, 2 ms are worth 0.4.
    assert best_choice([row], times, going).width == 3


@given(
    st.lists(st.floats(0.1, 5.0), min_size=3, max_size=6),
    st.lists(st.floats(0.0, 3.0), min_size=2, max_size=5),
    st.lists(st.floats(0.0, 1.0), min_size=4, max_size=4),
    st.integers(1, 3),
)
@settings(max_examples=200, deadline=None)
def test_no_other_choice_has_a_higher_rate(
    more: list[float], propose: list[float], chances: list[float], rows: int
) -> None:
    verify = np.cumsum(more)
    times = StepCost(verify, np.cumsum([0.0, *propose]))
    most, widest = len(times.propose) - 1, len(verify) - 1

    def expected(count: int) -> list[float]:
        sums, chance = [0.0], 1.0
        for position in range(count):
            chance *= chances[position % len(chances)]
            sums.append(sums[-1] + chance)
        return sums

    proposed = expected(most)
    row = RowOutlook([0.0] * (widest + 1), proposed)
    choice = best_choice([row] * rows, times)
    rates = {
        (k, width): rows * (1 + proposed[min(k, width)]) / (verify[width] + times.propose[k])
        for k, width in product(range(most + 1), range(widest + 1))
    }
    assert max(choice.rates) == pytest.approx(max(rates.values()))
    best = max(rate for (k, _), rate in rates.items() if k == choice.proposals)
    assert best == pytest.approx(max(rates.values()))
    # Nothing is at hand, so nothing is verified.
    assert choice.width == 0
