"""On a GPU: each acceptance rule emits the exact distribution."""

from __future__ import annotations

import pytest
from acceptance_graph import AcceptanceGraph
from rule_checks import check_laws, check_numbers, rule_p_values


def test_laws_are_exact(graph: AcceptanceGraph) -> None:
    check_laws(graph)


def test_random_numbers_are_those_of_a_cpu(graph: AcceptanceGraph) -> None:
    check_numbers(graph)


@pytest.mark.parametrize("rule", ["matching", "rejection"])
def test_lossless_rules_emit_the_target_s_law(graph: AcceptanceGraph, rule: str) -> None:
    assert min(rule_p_values(graph, rule)) > 1e-3


def test_a_rule_that_redraws_the_refused_draft_does_not(graph: AcceptanceGraph) -> None:
    assert min(rule_p_values(graph, "naive")) < 1e-9
