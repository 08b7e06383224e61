"""What steps cost is measured at the start, once, and leaves nothing behind."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from runs import MAX_LENGTH, assert_left_empty
from tiny import TinyPair

from unispec.engine import Engine, EngineConfig
from unispec.pipelines.policy.costs import StepCosts

PAIR = "llama_eagle_agreeing"
PHASE = "measuring what steps cost"


@pytest.mark.compiles(PAIR)
def test_costs_are_measured_once_and_kept(
    tiny_pair: Callable[[str], TinyPair],
    target_only_engine: Engine,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    target_only_engine.load()  # compiles the kernels, which stay where they are
    monkeypatch.setenv("UNISPEC_CACHE", str(tmp_path))
    config = EngineConfig(
        model=str(tiny_pair(PAIR).target),
        speculative_method="ngram",
        num_speculative_tokens="auto",
        max_batch_size=3,
        max_length=MAX_LENGTH,
    )

    def load() -> list[str]:
        phases: list[str] = []
        engine = Engine(config, on_progress=phases.append)
        engine.load()
        assert_left_empty(engine)
        return phases

    assert PHASE in load()
    (path,) = (tmp_path / "step_costs").glob("*.json")
    costs = StepCosts.read(path)
    assert costs is not None
    for rows in (1, 2, 3):
        cost = costs.at(rows, 100)
        assert cost.verify.shape == (17,)
        assert cost.propose.tolist() == [0.0]
        assert np.all(cost.verify > 0)
        assert np.all(np.diff(cost.verify) >= 0)

    def held(holds: bool) -> None:
        name = "unispec.pipelines.runtime.speculating.still_hold"
        monkeypatch.setattr(name, lambda *_, **__: holds)

    held(True)
    assert PHASE not in load()
    held(False)
    assert PHASE in load()
    path.write_text("damaged")
    held(True)
    assert PHASE in load()
