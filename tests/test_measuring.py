"""What steps cost is measured at the start, once, and leaves nothing behind."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from max.dtype import DType
from max.graph import DeviceRef, Graph, TensorType, ops
from runs import MAX_LENGTH, assert_left_empty
from tiny import TinyPair

from unispec.engine import Engine, EngineConfig
from unispec.pipelines.policy.costs import StepCost, StepCosts
from unispec.pipelines.runtime import measuring
from unispec.pipelines.runtime.model import digest_of

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


@pytest.mark.parametrize(
    ("alone", "verifying", "both", "holds"),
    [
        (0.010, 0.012, 0.013, True),
        # A slower moment, alike for all.
        (0.020, 0.024, 0.026, True),
        (0.010, 0.0125, 0.0136, True),
        (0.010, 0.0145, 0.0155, False),
        (0.010, 0.012, 0.0155, False),
        # The sum is as before, but not what it consists of.
        (0.010, 0.0105, 0.013, False),
    ],
)
def test_costs_hold_where_steps_compare_as_they_did(
    monkeypatch: pytest.MonkeyPatch, alone: float, verifying: float, both: float, holds: bool
) -> None:
    """Within a tenth; a step took 10 ms, a draft 2 ms to verify and 1 ms to propose."""
    times = {(0, 0): alone, (1, 0): verifying, (1, 1): both}
    monkeypatch.setattr(measuring, "_running", lambda *_: nullcontext([]))
    monkeypatch.setattr(
        measuring, "_Stopwatch", lambda *_: lambda *kinds: [times[kind] for kind in kinds]
    )
    cost = StepCost(np.array([0.010, 0.012]), np.array([0.0, 0.001]))
    pipeline: Any = SimpleNamespace(model=SimpleNamespace(most_proposed=8))
    costs = StepCosts({(1, 64): cost})
    held = measuring.still_hold(costs, pipeline, max_length=MAX_LENGTH, vocab_size=9)
    assert held == holds


def test_graphs_that_differ_within_a_layer_have_costs_of_their_own() -> None:
    kind = TensorType(DType.float32, [2], DeviceRef.CPU())

    def graph_of(factor: float) -> Graph:
        with Graph("step", input_types=[kind]) as graph:
            with graph.add_subgraph("layer", input_types=[kind]) as layer:
                layer.output(layer.inputs[0].tensor * factor)
            graph.output(*ops.call(layer, graph.inputs[0].tensor))
        return graph

    same, other = digest_of(graph_of(2.0)), digest_of(graph_of(3.0))
    assert same == digest_of(graph_of(2.0))
    assert same != other
