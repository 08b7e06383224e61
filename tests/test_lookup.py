"""Proposals by lookup against a search that tries every place."""

from __future__ import annotations

import random
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from reference.lookup import longest_match, looked_up

from unispec.pipelines.lookup.automaton import Match, SuffixAutomaton
from unispec.pipelines.lookup.store import AnswerStore


@given(st.lists(st.integers(0, 3), max_size=60), st.integers(1, 9))
@settings(max_examples=300, deadline=None)
def test_the_longest_match_is_found(tokens: list[int], at_most: int) -> None:
    automaton = SuffixAutomaton()
    for count, token in enumerate(tokens, start=1):
        automaton.extend([token])
        found, expected = automaton.longest_match(at_most), longest_match(tokens[:count], at_most)
        assert found.length == expected[0]
        # Any place where it stands; which one it is only matters for what follows.
        assert tokens[found.end - found.length : found.end] == tokens[count - found.length : count]
        assert found.end < count or not found.length


@pytest.mark.parametrize("alphabet", [5, 40])
def test_of_several_places_the_last_one_is_taken(alphabet: int) -> None:
    tokens = random.Random(alphabet).choices(range(alphabet), k=400)
    automaton = SuffixAutomaton()
    for count, token in enumerate(tokens, start=1):
        automaton.extend([token])
        for at_most in (1, 2, 3, 16):
            found = automaton.longest_match(at_most)
            assert found == longest_match(tokens[:count], at_most)
            if found.length:
                expected = looked_up(tokens[:count], 6, 1, at_most)
                assert automaton.continuation(found.end, 6) == expected


def test_what_follows_a_match_is_proposed() -> None:
    automaton = SuffixAutomaton([1, 2, 3, 4, 5, 9, 2, 3])
    assert automaton.longest_match(8) == Match(2, 3)
    assert automaton.continuation(3, 4) == [4, 5, 9, 2]


def test_a_match_that_reaches_the_end_goes_on_repeating_itself() -> None:
    automaton = SuffixAutomaton([7, 1, 2, 1, 2, 1])
    assert automaton.longest_match(8) == Match(3, 4)
    assert automaton.continuation(4, 5) == [2, 1, 2, 1, 2]


def test_a_text_without_repetition_has_no_match() -> None:
    assert SuffixAutomaton([]).longest_match(4) == Match(0, 0)
    assert SuffixAutomaton([1]).longest_match(4) == Match(0, 0)
    assert SuffixAutomaton([1, 2, 3]).longest_match(4) == Match(0, 0)


def test_a_long_text_has_two_states_a_token_at_most() -> None:
    automaton = SuffixAutomaton(random.Random(1).choices(range(200), k=20_000))
    assert 20_000 < len(automaton._length) <= 40_000


def test_an_answer_is_found_in_the_store() -> None:
    store = AnswerStore(100, 3)
    store.add([1, 2, 3, 4, 5, 6])
    store.add([9, 2, 3, 4, 8, 7])
    assert store.continuation([0, 2, 3, 4], 2) == [8, 7]
    assert store.continuation([1, 2, 3], 9) == [4, 5, 6]
    assert store.continuation([2, 3], 2) == []
    assert store.continuation([4, 5, 6], 2) == []


def test_the_same_answer_again_takes_no_more_room() -> None:
    store = AnswerStore(12, 2)
    store.add([6, 7, 8, 9, 5])
    for _ in range(4):
        store.add([1, 2, 3, 4, 5])
    assert store.continuation([6, 7], 1) == [8]


def test_a_text_that_repeats_itself_is_looked_through_in_constant_time() -> None:
    automaton = SuffixAutomaton([5] * 3000)
    assert automaton.longest_match(4) == (4, automaton.longest_match(4).end)
    assert automaton.continuation(automaton.longest_match(4).end, 3) == [5, 5, 5]
    states: list[int] = []

    class Links(list[int]):
        def __getitem__(self, index: Any) -> Any:
            states.append(index)
            return super().__getitem__(index)

    automaton._link = Links(automaton._link)
    automaton.longest_match(4)
    automaton.extend([5])
    assert len(states) < 100


def test_the_store_forgets_what_was_not_used_for_longest() -> None:
    store = AnswerStore(12, 2)
    store.add([1, 2, 3, 4, 5])
    store.add([6, 7, 8, 9, 5])
    assert store.continuation([1, 2], 1) == [3]
    store.add([11, 12, 13, 14])
    assert store.continuation([1, 2], 1) == [3]
    assert store.continuation([6, 7], 1) == []
    assert store.continuation([11, 12], 1) == [13]
    assert len(store._places) == 3 + 2


def test_answers_that_begin_alike_are_kept_once_each() -> None:
    store = AnswerStore(40, 4)
    store.add([50, 51, 52, 53, 54, 55])
    for _ in range(8):
        store.add([1, 2, 3, 4, 5, 6])
        store.add([1, 2, 3, 4, 7, 8])
    assert store.continuation([50, 51, 52, 53], 2) == [54, 55]
    assert store.continuation([1, 2, 3, 4], 2) == [7, 8]


def test_what_two_texts_have_is_found_as_long_as_one_is_kept() -> None:
    store = AnswerStore(18, 2)
    store.add([1, 2, 3, 4, 5, 6, 7])
    store.add([9, 2, 3, 4, 5, 8, 8])
    assert store.continuation([2, 3], 3) == [4, 5, 8]
    assert store.continuation([1, 2], 1) == [3]
    store.add([11, 12, 13, 14, 15])
    assert store.continuation([9, 2], 1) == []
    assert store.continuation([2, 3], 3) == [4, 5, 6]


def test_of_a_text_that_is_too_long_the_end_is_kept() -> None:
    store = AnswerStore(5, 2)
    store.add(list(range(20)))
    assert store.continuation([15, 16], 9) == [17, 18, 19]
    assert store.continuation([13, 14], 9) == []
