"""A sound pair to be damaged; nothing is compiled, and there is no GPU."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from damages import CompileReachedError
from max.engine import InferenceSession
from tiny import TinyPair


@pytest.fixture(autouse=True)
def no_compile(monkeypatch: pytest.MonkeyPatch) -> None:
    def load(*arguments: object, **options: object) -> None:
        raise CompileReachedError

    monkeypatch.setattr(InferenceSession, "load", load)
    monkeypatch.setattr(InferenceSession, "load_all", load)


@pytest.fixture
def pair(tiny_pair: Callable[[str], TinyPair], tmp_path: Path) -> TinyPair:
    """A sound target (hidden 64, 256 tokens, 512 positions) and its draft, to be damaged."""
    sound = tiny_pair("llama_eagle")
    return TinyPair(
        *(shutil.copytree(path, tmp_path / path.name) for path in (sound.target, sound.draft))
    )


@pytest.fixture(autouse=True)
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("unispec.engine.pipeline_config.accelerator_count", lambda: 0)
