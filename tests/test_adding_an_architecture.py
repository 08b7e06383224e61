"""The page "Adding an architecture": its files and blocks, up to the compilation of the graph."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from max.engine import InferenceSession
from max.graph import Graph
from runs import run_python
from test_registration import RESOLVE

from unispec.errors import InputError
from unispec.pipelines.architectures import registry
from unispec.pipelines.architectures.unified_eagle_llama3 import UnifiedEagleLlama3Model
from unispec.pipelines.runtime.model import UnifiedModel

PAGE = Path(__file__).resolve().parent.parent / "docs" / "adding-an-architecture.md"
BLOCKS = re.findall(
    r'^```python(?: title="([^"]+)")?\n(.*?)^```$', PAGE.read_text(), re.MULTILINE | re.DOTALL
)
FILES = {name: code for name, code in BLOCKS if name}
STEPS = [code for name, code in BLOCKS if not name]


class CompileReachedError(Exception):
    """Carries what would have been compiled."""

    def __init__(self, graph: Graph, weights: dict[str, Any]) -> None:
        super().__init__()
        self.graph = graph
        self.weights = weights


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The working directory, with the files of the page; nothing of them outlasts the test."""
    for name, code in FILES.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(code)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(registry, "_ADDED", {})

    def stop(
        model: UnifiedModel, session: InferenceSession, graph: Graph, weights: dict[str, Any]
    ) -> None:
        raise CompileReachedError(graph, weights)

    monkeypatch.setattr(UnifiedModel, "compile", stop)
    yield tmp_path
    for name in [name for name in sys.modules if name.partition(".")[0] == "granite_eagle"]:
        del sys.modules[name]


@pytest.mark.usefixtures("folder")
def test_the_page_leads_to_a_graph() -> None:
    *before, last = STEPS
    names: dict[str, Any] = {}
    for code in before:
        exec(code, names)
    with pytest.raises(CompileReachedError) as reached:
        exec(last, names)
    assert reached.value.graph.name == "granite_eagle"
    weights = set(reached.value.weights)
    assert {"target.lm_head.weight", "target.layers.1.mlp.up_proj.weight"} <= weights
    assert {"draft.fc.weight", "draft.layers.0.mlp.up_proj.weight"} <= weights


def test_max_resolves_the_pair_to_the_classes_of_the_page(folder: Path) -> None:
    """Granite without a draft stays MAX's own."""
    exec(STEPS[0], {})
    code = RESOLVE.replace("unispec.pipelines.architectures", f"{folder}:granite_eagle")
    assert json.loads(run_python(code, json.dumps(["target", "draft", "eagle", 3]))) == [
        "granite_eagle.model.GraniteEagleModel",
        "granite_eagle.config.GraniteEagleConfig",
        3,
    ]
    alone, *_ = json.loads(run_python(code, json.dumps(["target", None, None, None])))
    assert alone.startswith("max.pipelines.architectures.")


def test_a_pair_has_one_architecture(monkeypatch: pytest.MonkeyPatch) -> None:
    class Other(UnifiedEagleLlama3Model):
        pass

    monkeypatch.setattr(registry, "_ADDED", {})
    registry.register("granite", "eagle", Other)
    registry.register("granite", "eagle", Other)
    for model_type in ("granite", "llama"):
        with pytest.raises(InputError, match=f"{model_type} with eagle has an architecture"):
            registry.register(model_type, "eagle", UnifiedEagleLlama3Model)
