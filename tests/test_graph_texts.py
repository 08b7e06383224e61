"""Every graph is the one that was recorded: its text, its inputs and the names of its weights.

A graph that is the same computes the same and comes from the cache of compiled graphs. One that is
changed on purpose is recorded anew: `python tests/graph_texts.py FOLDER --record`.
"""

from __future__ import annotations

import json
import re
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


@pytest.mark.parametrize(
    "name",
    ["llama_eagle_biased", "llama_eagle3_sampled", "llama_dflash_windowed", "deepseek_mtp_sampled"],
)
def test_a_draft_computes_in_branches_alone(name: str) -> None:
    """Its weights are read by operations of loops only, which take no round where K is 0."""
    text, _, _ = build(name).text.partition("\n  }")  # the step's graph, without subgraphs
    weights = re.findall(r'(%\d+) = mo.constant.external \[name = "draft\.', text)
    assert len(weights) >= 5
    outside = [line for line in text.splitlines() if re.match(r" {4}\S", line)]
    assert len(outside) >= 100
    for weight in weights:
        used = re.compile(rf"\(.*{weight}\b.*\) ")
        assert used.search(text), weight
        assert [line for line in outside if used.search(line)] == []
