"""The checks of `rule_checks`, which GPUs have to pass, on a CPU; and that they can fail."""

from __future__ import annotations

import pytest
from acceptance_graph import AcceptanceGraph
from acceptance_laws import LOSSLESS, P_VALUE
from rule_checks import check_laws, check_numbers, rule_p_values


def test_laws_and_numbers_are_exact(graph: AcceptanceGraph) -> None:
    check_laws(graph)
    check_numbers(graph)


@pytest.mark.parametrize("rule", LOSSLESS)
def test_lossless_rules_emit_the_law(graph: AcceptanceGraph, rule: str) -> None:
    assert min(rule_p_values(graph, rule)) > P_VALUE


def test_a_rule_that_redraws_the_refused_draft_is_seen(graph: AcceptanceGraph) -> None:
    assert min(rule_p_values(graph, "naive")) < 1e-9
