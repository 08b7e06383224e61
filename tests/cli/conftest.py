"""The engine that the command takes for the real one, and a checkpoint for it."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

import pytest
from fake_engine import FakeEngine, save_checkpoint

from unispec import engine as engine_package


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch) -> type[FakeEngine]:
    """The class that the command takes for the engine; tests may change its attributes."""

    class Scripted(FakeEngine):
        made: ClassVar[list[FakeEngine]] = []

    monkeypatch.setattr(engine_package, "Engine", Scripted)
    return Scripted


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A checkpoint folder without defaults for sampling."""
    return save_checkpoint(tmp_path / "model")
