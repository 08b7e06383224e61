"""Which replica a request goes to; the interface to Ray Serve is test_ray_replicas.py's."""

from __future__ import annotations

from collections import Counter

import pytest

from unispec.deployment.affinity import Affinity
from unispec.deployment.router import Places
from unispec.errors import InputError

IDLE = {"a": 0, "b": 0, "c": 0, "d": 0}


def affinity(*blocks: str, session: str | None = None) -> Affinity:
    keys = tuple(block.encode() for block in blocks)
    return Affinity(None if session is None else session.encode(), keys)


def test_a_beginning_has_the_same_place_in_every_router() -> None:
    for number in range(50):
        one = Places(1.25).ranked(affinity(str(number)), IDLE)
        assert one == Places(1.25).ranked(affinity(str(number)), dict(reversed(IDLE.items())))
        assert sorted(one) == sorted(IDLE)


def test_beginnings_spread_over_all_replicas() -> None:
    places = Places(1.25)
    first = Counter(places.ranked(affinity(str(number)), IDLE)[0] for number in range(1000))
    # 250 each; the bounds are seven deviations of a fair draw away.
    assert all(150 < count < 350 for count in first.values()), first


def test_who_leaves_moves_its_own_only() -> None:
    places = Places(1.25)
    rest = {name: load for name, load in IDLE.items() if name != "c"}
    for number in range(200):
        before = places.ranked(affinity(str(number)), IDLE)
        after = places.ranked(affinity(str(number)), rest)
        assert after == [name for name in before if name != "c"]


def test_a_request_goes_where_the_longest_part_of_its_beginning_went() -> None:
    places = Places(1.25)
    places.went(affinity("1", "2", "3"), "a")
    places.went(affinity("1", "2", "4"), "b")
    assert places.ranked(affinity("1", "2", "3", "5"), IDLE)[0] == "a"
    assert places.ranked(affinity("1", "2", "4", "5"), IDLE)[0] == "b"
    # The shared part is where it went last.
    assert places.ranked(affinity("1", "2", "6"), IDLE)[0] == "b"


def test_a_session_counts_more_than_a_beginning() -> None:
    places = Places(1.25)
    places.went(affinity("1", session="s"), "a")
    places.went(affinity("2"), "b")
    assert places.ranked(affinity("2", session="s"), IDLE)[0] == "a"


def test_a_replica_that_is_gone_is_not_waited_for() -> None:
    places = Places(1.25)
    places.went(affinity("1", "2"), "gone")
    places.went(affinity("1"), "a")
    assert places.ranked(affinity("1", "2"), IDLE)[0] == "a"


def test_one_that_has_more_than_its_share_is_passed_over() -> None:
    places = Places(1.25)
    places.went(affinity("1"), "a")
    # With this request 8 run, 2 each; a quarter more makes 2.5, so 3 at most.
    assert places.ranked(affinity("1"), {"a": 2, "b": 2, "c": 2, "d": 1})[0] == "a"
    ranked = places.ranked(affinity("1"), {"a": 3, "b": 2, "c": 1, "d": 1})
    assert ranked[-1] == "a"


def test_nobody_gets_more_than_its_share_of_one_beginning() -> None:
    places, loads = Places(1.25), dict(IDLE)
    for _ in range(100):
        chosen = places.ranked(affinity("1"), loads)[0]
        places.went(affinity("1"), chosen)
        loads[chosen] += 1
    assert max(loads.values()) <= 32  # a quarter more than 25, rounded up


def test_what_has_no_beginning_goes_to_the_idlest() -> None:
    assert Places(1.25).ranked(Affinity(), {"a": 3, "b": 1, "c": 2}) == ["b", "c", "a"]


def test_it_forgets_the_oldest_beginnings() -> None:
    places = Places(1.25)
    for number in range((1 << 16) + 1):
        places.went(affinity(str(number)), "a")
    free = next(
        str(number)
        for number in range(1 << 16)
        if Places(1.25).ranked(affinity(str(number)), IDLE)[0] != "a" and number
    )
    home = Places(1.25).ranked(affinity("0"), IDLE)[0]
    assert places.ranked(affinity("0"), IDLE)[0] == home
    assert places.ranked(affinity(free), IDLE)[0] == "a"


@pytest.mark.parametrize("factor", [1, 0.5, float("nan")])
def test_a_load_factor_that_admits_nobody_is_refused(factor: float) -> None:
    with pytest.raises(InputError, match="load_factor is"):
        Places(factor)
