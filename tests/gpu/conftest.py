"""What the tests on a real GPU share: engines, each compiled once, and their references.

`pytest tests/gpu` runs them, one file a subject; without a GPU it says so and ends. A run of all
tests does not come here, see `norecursedirs` in pyproject.toml.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache

import pytest
from acceptance_graph import AcceptanceGraph
from draft_judges import JUDGES, Judge
from gpu_pairs import GPU_PAIRS, ROUNDING
from max.driver import Accelerator, accelerator_count
from reference.target import TargetReference
from runs import tiny_config
from tiny import TinyPair

from unispec.engine import Engine


def pytest_configure() -> None:
    if not accelerator_count():
        pytest.exit("MAX finds no GPU on this machine, and tests/gpu needs one", returncode=1)


@pytest.fixture(scope="session")
def gpu_pair(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], TinyPair]:
    """A pair of `GPU_PAIRS`, by name."""
    return cache(lambda name: GPU_PAIRS[name](tmp_path_factory.mktemp(name)))


@pytest.fixture(scope="session")
def gpu_engine(gpu_pair: Callable[[str], TinyPair]) -> Callable[[str], Engine]:
    """Its engine on the first GPU."""
    return cache(lambda name: Engine(replace(tiny_config(gpu_pair(name)), devices="gpu")))


@pytest.fixture(scope="session")
def gpu_target(gpu_pair: Callable[[str], TinyPair]) -> Callable[[str], TargetReference]:
    """Its target in torch, in float32 on the CPU."""
    return cache(lambda name: TargetReference(gpu_pair(name).target, ROUNDING[name]))


@pytest.fixture(scope="session")
def gpu_judge(
    gpu_pair: Callable[[str], TinyPair], gpu_target: Callable[[str], TargetReference]
) -> Callable[[str], Judge]:
    """Its draft in torch, likewise."""

    def judge(name: str) -> Judge:
        pair = gpu_pair(name)
        return JUDGES[pair.method](pair.draft or pair.target, gpu_target(name))

    return cache(judge)


@pytest.fixture(scope="session")
def graph() -> AcceptanceGraph:
    """All acceptance rules on the first GPU."""
    return AcceptanceGraph(Accelerator())
