"""Every graph is the one that was recorded: its text, its inputs and the names of its weights.

A graph that is the same computes the same and comes from the cache of compiled graphs. One that is
changed on purpose is recorded anew: `python tests/graph_texts.py FOLDER --record`.
"""

from __future__ import annotations

import json
from typing import Any

import pytest
from graph_texts import GRAPHS, RECORDED, VIRTUAL, build, describe

EXPECTED: dict[str, dict[str, Any]] = json.loads(RECORDED.read_text())


def test_every_graph_is_recorded() -> None:
    parts = {f"{name}: {part}" for name in VIRTUAL for part in ("unified", "alone")}
    assert set(EXPECTED) == set(GRAPHS) | parts


@pytest.mark.parametrize("name", GRAPHS)
def test_a_graph_is_the_recorded_one(name: str) -> None:
    built = build(name)
    assert describe(built.text, built.weights) == EXPECTED[name]
