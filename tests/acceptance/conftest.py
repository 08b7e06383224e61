"""All acceptance rules in one compiled graph."""

from __future__ import annotations

import pytest
from acceptance_graph import AcceptanceGraph


@pytest.fixture(scope="session")
def graph() -> AcceptanceGraph:
    """All rules, compiled once."""
    return AcceptanceGraph()
