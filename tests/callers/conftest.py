"""An engine whose graph is computed in NumPy."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
from numpy_graph import NumpyGraph, numpy_engine
from tiny import TinyPair

from unispec.engine import Engine


@pytest.fixture
def made(
    tiny_pair: Callable[[str], TinyPair], monkeypatch: pytest.MonkeyPatch
) -> Iterator[tuple[Engine, NumpyGraph]]:
    """An engine of up to 4 rows, and its graph; every test leaves it empty."""
    with numpy_engine(tiny_pair("llama_eagle"), monkeypatch) as both:
        yield both
