"""A compiled graph in a folder: it answers as the one that is compiled anew, or it is refused."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from max.engine import InferenceSession
from PIL import Image
from runs import MAX_LENGTH, answers, greedy_requests, tiny_config
from tiny import TinyPair
from tiny.kimi import PLACEHOLDER

from unispec.engine import Engine, EngineConfig
from unispec.engine.served_config import served_pipeline
from unispec.errors import InputError
from unispec.pipelines.unified import model as unified_model

PAIR = "llama_eagle_agreeing"
pytestmark = pytest.mark.compiles(PAIR)

PROMPTS = [[5, 6, 7], list(range(40, 120)), [9]]


@pytest.fixture(scope="module")
def folder(tiny_pair: Callable[[str], TinyPair], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("compiled") / "graph"
    Engine(tiny_config(tiny_pair(PAIR))).compile(folder)
    assert sorted(path.name for path in folder.iterdir()) == ["manifest.json", "step.mef"]
    return folder


@pytest.fixture
def copy(folder: Path, tmp_path: Path) -> Path:
    """The folder, to be changed."""
    return Path(shutil.copytree(folder, tmp_path / "copy"))


@pytest.fixture
def nothing_is_built(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("a graph was built or compiled")

    monkeypatch.setattr(unified_model, "build_graph", refuse)
    for name in ("load", "load_all", "compile"):
        monkeypatch.setattr(InferenceSession, name, refuse)


@pytest.fixture(scope="module")
def expected(tiny_engine: Callable[[str], Engine]) -> list[list[int]]:
    """What the graph answers that is compiled anew."""
    return answers(tiny_engine(PAIR), greedy_requests(PROMPTS, 24))


@pytest.mark.usefixtures("nothing_is_built")
def test_it_answers_as_the_graph_that_is_compiled_anew(
    tiny_pair: Callable[[str], TinyPair], folder: Path, expected: list[list[int]]
) -> None:
    phases: list[str] = []
    # What a graph does not depend on may differ.
    config = replace(
        tiny_config(tiny_pair(PAIR)),
        compiled=folder,
        max_batch_size=3,
        max_batch_input_tokens=32,
        kv_cache_pages=9,
        prompt_lookup_max=8,
    )
    engine = Engine(config, on_progress=phases.append)
    engine.num_speculative_tokens = 2
    assert answers(engine, greedy_requests(PROMPTS, 24)) == expected
    assert "loading weights and the compiled graph" in phases
    assert engine.pipeline.model.graph_digest == manifest_of(folder)["graph"]


def manifest_of(folder: Path) -> dict[str, Any]:
    return dict(json.loads((folder / "manifest.json").read_text()))


def test_the_manifest_names_the_graph_and_its_inputs(
    tiny_engine: Callable[[str], Engine], folder: Path
) -> None:
    manifest = manifest_of(folder)
    facts, weights = manifest["identity"]["facts"], manifest["identity"]["weights"]
    assert facts["graph"] == "unified_eagle_llama3"
    assert facts["target.max_seq_len"] == str(MAX_LENGTH)
    assert facts["speculative_config.draft_proposal"] == "'argmax'"
    inputs = [name for name in facts if name.startswith("input ")]
    model = tiny_engine(PAIR).pipeline.model
    assert len(inputs) == len(model.model.input_metadata)
    assert weights.keys() == model.weights_registry.keys()
    assert weights["target.embed_tokens.weight"] == "float32 [256, 64]"


def refused(config: EngineConfig, message: str) -> None:
    with pytest.raises(InputError, match=message):
        Engine(config).load()


@pytest.mark.usefixtures("nothing_is_built")
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_length": 256}, r"max_seq_len 512, here it is 256: give the options"),
        ({"num_speculative_tokens": 3}, r"num_draft_tokens 8, here it is 3: give the options"),
        (
            {"quantization_encoding": "q8_0"},
            r"with weight target\.\S+ float32 \[256, 64\], here it is uint8 \[16, 1088\]",
        ),
        (
            {"draft_model": None, "speculative_method": None, "num_speculative_tokens": None},
            r"with graph unified_eagle_llama3, here it is llama3_target: give the options",
        ),
    ],
)
def test_another_model_is_refused(
    tiny_pair: Callable[[str], TinyPair], folder: Path, options: dict[str, Any], message: str
) -> None:
    refused(replace(tiny_config(tiny_pair(PAIR)), compiled=folder, **options), message)


@pytest.mark.usefixtures("nothing_is_built")
@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("versions max", "26.6.0", r"by max 26\.6\.0, this is 26\.7\.0: run unispec compile"),
        ("versions unispec", "0.0.1", r"by unispec 0\.0\.1, this is \S+: run"),
        ("sources", "0" * 64, r"by other source files of unispec \S+: run"),
        ("processor machine", "riscv64", r"for riscv64, this is \w+: run"),
        (
            "processor features",
            ["amx_tile99"],
            r"for a processor with amx_tile99, which this one lacks: run",
        ),
        ("device", "cuda:sm_90a", r"for cuda:sm_90a, this is cpu: run .* with its --target"),
        ("facts target.rope_theta", "7.0", r"with target\.rope_theta 7\.0, here it is"),
        ("facts input 0", "of another type", r"with input 0 of another type, here it is"),
        ("weights target.more", "float32 [1]", r"with weight target\.more float32 \[1\], here it"),
    ],
)
def test_what_was_compiled_for_something_else_is_refused_with_the_reason(
    tiny_pair: Callable[[str], TinyPair], copy: Path, path: str, value: Any, message: str
) -> None:
    manifest = manifest_of(copy)
    outer, _, inner = path.partition(" ")
    identity = manifest["identity"]
    if inner:
        identity[outer][inner] = value
    else:
        identity[outer] = value
    (copy / "manifest.json").write_text(json.dumps(manifest))
    refused(replace(tiny_config(tiny_pair(PAIR)), compiled=copy), message)


@pytest.mark.usefixtures("nothing_is_built")
@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("format", 0),
        ("code", None),
        ("graph", 1),
        ("identity", []),
        ("identity", {"versions": {}}),
        ("identity versions", None),
        ("identity facts", []),
        ("identity weights", {"a": 1}),
        ("identity processor", None),
        ("identity processor", {"machine": "x86_64", "features": None}),
        ("identity processor", {"machine": "x86_64", "features": [[]]}),
        ("identity device", {}),
    ],
)
def test_a_manifest_of_another_form_is_refused(
    tiny_pair: Callable[[str], TinyPair], copy: Path, path: str, value: Any
) -> None:
    manifest = manifest_of(copy)
    outer, _, inner = path.partition(" ")
    if inner:
        manifest[outer][inner] = value
    else:
        manifest[outer] = value
    (copy / "manifest.json").write_text(json.dumps(manifest))
    message = r"manifest\.json is damaged, or of another version of unispec: run unispec compile"
    with pytest.raises(InputError, match=message):
        Engine(replace(tiny_config(tiny_pair(PAIR)), compiled=copy))


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 0xFF
    path.write_bytes(data)


@pytest.mark.usefixtures("nothing_is_built")
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda folder: flip(folder / "step.mef"), "missing or damaged"),
        (lambda folder: (folder / "step.mef").unlink(), "missing or damaged"),
        (lambda folder: (folder / "step.mef").write_bytes(b""), "missing or damaged"),
        (lambda folder: (folder / "manifest.json").unlink(), "has no manifest.json: give a folder"),
        (lambda folder: (folder / "manifest.json").write_text("{"), "is damaged, or of another"),
        (lambda folder: (folder / "manifest.json").write_text("[]"), "is damaged, or of another"),
        (lambda folder: (folder / "manifest.json").write_bytes(b"\xff"), "is damaged, or of"),
    ],
)
def test_a_damaged_folder_is_refused(
    tiny_pair: Callable[[str], TinyPair],
    copy: Path,
    change: Callable[[Path], None],
    message: str,
) -> None:
    change(copy)
    refused(replace(tiny_config(tiny_pair(PAIR)), compiled=copy), message)


@pytest.mark.usefixtures("nothing_is_built")
def test_a_folder_that_is_not_empty_is_left_as_it_is(
    tiny_pair: Callable[[str], TinyPair], copy: Path
) -> None:
    with pytest.raises(InputError, match="is there already and not empty; give another folder"):
        Engine(tiny_config(tiny_pair(PAIR))).compile(copy)
    assert sorted(path.name for path in copy.iterdir()) == ["manifest.json", "step.mef"]


@pytest.mark.usefixtures("nothing_is_built")
def test_what_is_no_code_is_refused_though_its_checksum_is_right(
    tiny_pair: Callable[[str], TinyPair], copy: Path
) -> None:
    (copy / "step.mef").write_bytes(b"no code")
    manifest = manifest_of(copy) | {"code": hashlib.sha256(b"no code").hexdigest()}
    (copy / "manifest.json").write_text(json.dumps(manifest))
    refused(replace(tiny_config(tiny_pair(PAIR)), compiled=copy), "missing or damaged")


@pytest.mark.usefixtures("nothing_is_built")
def test_what_is_compiled_is_not_compiled_again(
    tiny_pair: Callable[[str], TinyPair], folder: Path, tmp_path: Path
) -> None:
    engine = Engine(replace(tiny_config(tiny_pair(PAIR)), compiled=folder))
    with pytest.raises(InputError, match="has the graph compiled already: leave compiled out"):
        engine.compile(tmp_path / "other")
    assert not (tmp_path / "other").exists()


def test_a_server_takes_it_and_refuses_another_before_it_starts(
    tiny_pair: Callable[[str], TinyPair], folder: Path, copy: Path
) -> None:
    config = replace(tiny_config(tiny_pair(PAIR)), compiled=folder)
    factory = served_pipeline(config).factory
    assert isinstance(factory, partial)
    assert factory.keywords["compiled"] == folder
    (copy / "manifest.json").unlink()
    with pytest.raises(InputError, match=r"has no manifest\.json"):
        served_pipeline(replace(config, compiled=copy))


@pytest.mark.compiles("kimi_dflash")
def test_a_model_of_two_graphs_is_one_file(
    tiny_pair: Callable[[str], TinyPair], tmp_path: Path
) -> None:
    """Kimi's language and vision."""
    config = tiny_config(tiny_pair("kimi_dflash"))
    engine = Engine(config)
    engine.compile(tmp_path / "graph")
    requests = greedy_requests([*PROMPTS, [5, PLACEHOLDER, 6]], 12)
    pixels = np.random.default_rng(1).integers(0, 256, (28, 40, 3), np.uint8)
    requests[-1] = replace(requests[-1], images=[Image.fromarray(pixels)])
    expected = answers(engine, requests)
    assert answers(Engine(replace(config, compiled=tmp_path / "graph")), requests) == expected
