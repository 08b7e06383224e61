"""The pages "Adding a target" and "Adding a draft method", up to the compilation of a graph."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from max.engine import InferenceSession
from max.graph import Graph
from max.pipelines.lib import PIPELINE_REGISTRY
from reference.target import TargetReference
from tiny import agreeing_dflash, agreeing_llama
from tiny.checkpoint import Array, read, write

from unispec.engine import Engine, EngineConfig
from unispec.engine.pipeline_config import make_pipeline_config
from unispec.errors import InputError
from unispec.methods import Method
from unispec.pipelines.architectures import registry
from unispec.pipelines.drafts.eagle.method import EAGLE
from unispec.pipelines.runtime.model import StepModel
from unispec.pipelines.targets.llama import LLAMA
from unispec.pipelines.targets.llama.stack_config import StackConfig
from unispec.pipelines.unified.compose import compose

DOCS = Path(__file__).resolve().parent.parent / "docs"


def blocks(page: str) -> tuple[dict[str, str], list[str]]:
    """The files that a page shows, by name, and its other blocks."""
    fence = r'^```python(?: title="([^"]+)")?\n(.*?)^```$'
    found = re.findall(fence, (DOCS / page).read_text(), re.MULTILINE | re.DOTALL)
    files = {name: code for name, code in found if name}
    return files, [code for name, code in found if not name]


TARGET_FILES, (CHECKPOINT, REGISTER_TARGET, REFERENCE, RUN_TARGET) = blocks("adding-a-target.md")
METHOD_FILES, (REGISTER_METHOD, DRAFT, RUN_METHOD) = blocks("adding-a-draft-method.md")
FILES = TARGET_FILES | METHOD_FILES


class CompileReachedError(Exception):
    """Carries what would have been compiled."""

    def __init__(self, model: StepModel, graph: Graph, weights: dict[str, Any]) -> None:
        super().__init__()
        self.model = model
        self.graph = graph
        self.weights = weights


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The working directory, with the files of the pages; nothing of them outlasts the test."""
    for name, code in FILES.items():
        (tmp_path / name).write_text(code)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(registry, "_RUN", dict(registry._RUN))

    def stop(
        model: StepModel,
        session: InferenceSession,
        build: Callable[[], Graph],
        weights: dict[str, Any],
        facts: dict[str, str],
    ) -> None:
        raise CompileReachedError(model, build(), weights)

    monkeypatch.setattr(StepModel, "compile", stop)
    own = PIPELINE_REGISTRY.retrieve_architecture("Phi3ForCausalLM")
    assert own is not None
    monkeypatch.setitem(PIPELINE_REGISTRY.architectures, own.name, own)
    yield tmp_path
    for name in FILES:
        sys.modules.pop(name.removesuffix(".py"), None)


def run(*codes: str) -> dict[str, Any]:
    """Runs blocks in order; the names that they leave."""
    names: dict[str, Any] = {}
    for code in codes:
        exec(code, names)
    return names


def compiled(*codes: str) -> CompileReachedError:
    """What blocks would compile, the last of them."""
    *before, last = codes
    names = run(*before)
    with pytest.raises(CompileReachedError) as reached:
        exec(last, names)
    return reached.value


def text(graph: Graph) -> str:
    """A graph with its subgraphs."""
    return str(graph.module.mlir_module)


def engine(method: Method | None = None, draft: Path | None = None) -> Engine:
    """Of the page's target; MAX reads each config.json once, by its path."""
    return Engine(
        EngineConfig(
            model=str(Path("target").resolve()),
            draft_model=None if draft is None else str(draft),
            speculative_method=method,
        )
    )


def changed(folder: str, fields: dict[str, Any], tensors: dict[str, Array | None]) -> None:
    """Rewrites a checkpoint with other fields and tensors; None: without it."""
    config, before = read(Path(folder))
    after = {name: tensor for name, tensor in (before | tensors).items() if tensor is not None}
    write(Path(folder), config | fields, after)


def test_the_target_leads_to_a_graph_with_the_parts_of_its_joined_matrices() -> None:
    """Both are those of the Llama that the checkpoint was made of."""
    reached = compiled(CHECKPOINT, REGISTER_TARGET, REFERENCE, RUN_TARGET)
    _, tensors = read(agreeing_llama(Path("llama")))
    llama = compiled('target, draft = "llama", "draft"', REFERENCE, RUN_TARGET)
    assert text(reached.graph) == text(llama.graph)
    assert set(reached.weights) == set(llama.weights)
    for name, tensor in tensors.items():
        weight = reached.weights[f"target.{name.removeprefix('model.')}"]
        np.testing.assert_array_equal(np.from_dlpack(weight), tensor, err_msg=name)


def test_transformers_reads_the_checkpoint_as_that_llama() -> None:
    """So the order of the parts is Phi-3's."""
    run(CHECKPOINT)
    prompt = [1, 17, 40, 5]
    _, expected = TargetReference(agreeing_llama(Path("llama"))).features_and_logits(prompt)
    _, logits = TargetReference("target").features_and_logits(prompt)
    np.testing.assert_allclose(logits, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("method", [None, "eagle", "dflash"])
def test_the_target_is_composed_with_each_method(method: Method | None) -> None:
    names = run(CHECKPOINT, REGISTER_TARGET)
    draft = Path("draft") if method == "eagle" else None
    if method == "dflash":
        draft = agreeing_dflash(Path("dflash"), agreeing_llama(Path("llama")))
    with pytest.raises(CompileReachedError) as reached:
        engine(method, draft).load()
    drafts = {"eagle": names["EAGLE"], "dflash": names["DFLASH"]}
    expected = compose(names["PHI3"], None if method is None else drafts[method])
    assert type(reached.value.model) is expected
    assert expected.family is names["PHI3"]
    own = {name for name in reached.value.weights if name.startswith("draft.")}
    assert bool(own) == (method is not None)


def test_max_resolves_the_target_to_the_composed_class() -> None:
    """An engine's process takes it in the place of the one that MAX has."""
    names = run(CHECKPOINT, REGISTER_TARGET)
    config = make_pipeline_config(EngineConfig(model="target"))
    factory = PIPELINE_REGISTRY.retrieve_factory(config).factory
    assert factory.keywords["pipeline_model"] is compose(names["PHI3"], None)
    assert PIPELINE_REGISTRY.architecture_for_config(config).config is StackConfig


def test_a_model_type_has_one_target_and_a_target_one_method_of_a_name() -> None:
    names = run(CHECKPOINT, REGISTER_TARGET, "from normed_eagle import NORMED_EAGLE")
    phi3 = names["PHI3"]
    registry.register(phi3, EAGLE)  # it is known already
    with pytest.raises(InputError, match="phi3 has a target already"):
        registry.register(replace(phi3, architecture="OtherForCausalLM"))
    with pytest.raises(InputError, match="phi3 has a method 'eagle' already"):
        registry.register(phi3, names["NORMED_EAGLE"])
    other = replace(phi3, model_type="phi", architecture="OtherForCausalLM")
    with pytest.raises(InputError, match="phi has a method 'eagle' already"):
        registry.register(other, EAGLE, names["NORMED_EAGLE"])
    with pytest.raises(InputError, match="LlamaForCausalLM has a target already"):
        registry.register(replace(phi3, model_type="phi", architecture="LlamaForCausalLM"))


def test_a_target_that_is_built_in_stays_max_s_own_for_max() -> None:
    before = PIPELINE_REGISTRY.retrieve_architecture("LlamaForCausalLM")
    registry.register(LLAMA, EAGLE)
    assert PIPELINE_REGISTRY.retrieve_architecture("LlamaForCausalLM") is before


@pytest.mark.parametrize(
    ("fields", "refusal"),
    [
        ({"sliding_window": 511}, "sliding_window 511 .* choose a max_length of at most 511"),
        (
            {
                "rope_scaling": {
                    "type": "longrope",
                    "short_factor": [1.0] * 8,
                    "long_factor": [2.0] * 8,
                }
            },
            "rope type 'longrope' of .*target is not supported",
        ),
        (
            {"partial_rotary_factor": 0.75},
            "partial_rotary_factor 0.75 of ",
        ),
    ],
)
def test_what_the_stack_cannot_compute_is_refused(fields: dict[str, Any], refusal: str) -> None:
    run(CHECKPOINT, REGISTER_TARGET)
    file = Path("target/config.json")
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))
    with pytest.raises(InputError, match=refusal):
        engine()


@pytest.mark.parametrize(
    ("rows", "refusal"),
    [
        (127, "v_proj.weight' has shape [31, 64], expected [32, 64]"),
        (129, "v_proj.weight' has shape [33, 64], expected [32, 64]"),
        (None, "lacks tensors 'layers.0.self_attn.q_proj.weight'"),
    ],
)
def test_a_joined_matrix_that_does_not_fit_is_refused(rows: int | None, refusal: str) -> None:
    run(CHECKPOINT, REGISTER_TARGET)
    matrix = None if rows is None else np.zeros((rows, 64))
    changed("target", {}, {"model.layers.0.self_attn.qkv_proj.weight": matrix})
    with pytest.raises(InputError, match=re.escape(refusal)):
        engine().load()


def test_the_method_leads_to_a_graph_that_norms_the_features() -> None:
    names = run(CHECKPOINT, REGISTER_TARGET)
    eagle = compiled(RUN_METHOD)
    del registry._RUN[names["PHI3"]]
    normed = compiled(REGISTER_METHOD, DRAFT, RUN_METHOD)
    added = set(normed.weights) - set(eagle.weights)
    assert added == {"draft.feature_norm.weight"}
    _, tensors = read(Path("draft"))
    weight = np.from_dlpack(normed.weights["draft.feature_norm.weight"])
    np.testing.assert_array_equal(weight, tensors["feature_norm.weight"])
    # Of the verified tokens, and in each round.
    norms = [text(reached.graph).count("rms_norm") for reached in (eagle, normed)]
    assert norms[1] == norms[0] + 2


@pytest.mark.parametrize(
    ("tensors", "refusal"),
    [
        ({"feature_norm.weight": None}, "draft lacks tensor 'feature_norm.weight'"),
        (
            {"feature_norm.weight": np.ones(63)},
            "'feature_norm.weight' has shape [63], expected [64]",
        ),
        (
            {"feature_norm.weight": np.full(64, np.nan)},
            "'feature_norm.weight' has 64 NaN or infinite values",
        ),
        ({"feature_norm.bias": np.ones(64)}, "'feature_norm.bias' that an EAGLE draft"),
        ({"fc.bias": np.ones(63)}, "'fc.bias' has shape [63], expected [64]"),
    ],
)
def test_a_draft_with_a_wrong_tensor_is_refused(
    tensors: dict[str, Array | None], refusal: str
) -> None:
    names = run(CHECKPOINT, REGISTER_METHOD, DRAFT)
    changed("draft", {}, tensors)
    with pytest.raises(InputError, match=re.escape(refusal)):
        exec(RUN_METHOD, names)


def test_eagle_refuses_the_draft_of_the_page() -> None:
    names = run(CHECKPOINT, REGISTER_TARGET, DRAFT)
    with pytest.raises(InputError, match=r"feature_norm\.weight.* that an EAGLE draft"):
        exec(RUN_METHOD, names)
