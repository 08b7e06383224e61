"""A compiled graph in a folder: it answers as the one that is compiled anew, or it is refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from max.engine import InferenceSession
from runs import answers, greedy_requests, tiny_config
from tiny import TinyPair

from unispec.engine import Engine
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


@pytest.mark.usefixtures("nothing_is_built")
def test_it_answers_as_the_graph_that_is_compiled_anew(
    tiny_pair: Callable[[str], TinyPair], tiny_engine: Callable[[str], Engine], folder: Path
) -> None:
    expected = answers(tiny_engine(PAIR), greedy_requests(PROMPTS, 24))
    phases: list[str] = []
    # What a graph does not depend on may differ.
    config = replace(tiny_config(tiny_pair(PAIR)), compiled=folder, max_batch_size=3)
    engine = Engine(config, on_progress=phases.append)
    engine.num_speculative_tokens = 2
    assert answers(engine, greedy_requests(PROMPTS, 24)) == expected
    assert "loading weights and the compiled graph" in phases
    assert engine.pipeline.model.graph_digest == tiny_engine(PAIR).pipeline.model.graph_digest


@pytest.mark.usefixtures("nothing_is_built")
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_length": 256}, r"max_seq_len 512, here it is 256: give the options"),
        (
            {"quantization_encoding": "q8_0"},
            r"with weight target\.\S+ float32 \[64, 64\], here it is uint8",
        ),
        (
            {"draft_model": None, "speculative_method": None, "num_speculative_tokens": None},
            r"with configuration \w*Eagle\w*, here it is",
        ),
    ],
)
def test_another_model_is_refused(
    tiny_pair: Callable[[str], TinyPair], folder: Path, options: dict[str, Any], message: str
) -> None:
    config = replace(tiny_config(tiny_pair(PAIR)), compiled=folder, **options)
    with pytest.raises(InputError, match=message):
        Engine(config).load()


@pytest.mark.usefixtures("nothing_is_built")
@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (("format",), 0, r"manifest\.json cannot be read by this version of unispec: run"),
        (("identity", "versions", "max"), "26.6.0", r"by max 26\.6\.0, this is 26\.7\.0: run"),
        (("identity", "versions", "unispec"), "0.0.1", r"by unispec 0\.0\.1, this is"),
        (("identity", "sources"), "0" * 64, r"by other source files of unispec \S+: run"),
        (
            ("identity", "device"),
            {"api": "cuda", "architecture": "sm_90a"},
            r"for cuda sm_90a, this is cpu: run unispec compile again with its --target",
        ),
        (
            ("identity", "device", "features"),
            ["avx", "amx_tile99"],
            r"for a processor with amx_tile99, which this one lacks: run",
        ),
        (
            ("identity", "config", "target.rope_theta"),
            "7.0",
            r"with target\.rope_theta 7\.0, here it is",
        ),
        (
            ("identity", "weights", "target.extra"),
            "float32 [1]",
            r"with weight target\.extra float32 \[1\], here it is nothing",
        ),
        (("code",), "0" * 64, r"step\.mef is missing or damaged: copy the folder again, or run"),
    ],
)
def test_what_was_compiled_for_something_else_is_refused_with_the_reason(
    tiny_pair: Callable[[str], TinyPair],
    copy: Path,
    path: tuple[str, ...],
    value: Any,
    message: str,
) -> None:
    manifest = json.loads((copy / "manifest.json").read_text())
    inner = manifest
    for name in path[:-1]:
        inner = inner[name]
    inner[path[-1]] = value
    (copy / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(InputError, match=message):
        Engine(replace(tiny_config(tiny_pair(PAIR)), compiled=copy)).load()


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
        (lambda folder: (folder / "manifest.json").write_text("{"), "cannot be read"),
        (lambda folder: (folder / "manifest.json").write_text("[]"), "cannot be read"),
        (lambda folder: (folder / "manifest.json").write_bytes(b"\xff"), "cannot be read"),
    ],
)
def test_a_damaged_folder_is_refused(
    tiny_pair: Callable[[str], TinyPair],
    copy: Path,
    change: Callable[[Path], None],
    message: str,
) -> None:
    change(copy)
    with pytest.raises(InputError, match=message):
        Engine(replace(tiny_config(tiny_pair(PAIR)), compiled=copy)).load()


@pytest.mark.usefixtures("nothing_is_built")
def test_a_folder_that_is_not_empty_is_left_as_it_is(
    tiny_pair: Callable[[str], TinyPair], copy: Path
) -> None:
    with pytest.raises(InputError, match="is there already and not empty; give another folder"):
        Engine(tiny_config(tiny_pair(PAIR))).compile(copy)
    assert sorted(path.name for path in copy.iterdir()) == ["manifest.json", "step.mef"]


@pytest.mark.compiles("kimi_dflash")
def test_a_model_of_two_graphs_is_one_file(
    tiny_pair: Callable[[str], TinyPair], tiny_engine: Callable[[str], Engine], tmp_path: Path
) -> None:
    """Kimi's language and vision."""
    config = tiny_config(tiny_pair("kimi_dflash"))
    Engine(config).compile(tmp_path / "graph")
    requests = greedy_requests(PROMPTS, 12)
    expected = answers(tiny_engine("kimi_dflash"), requests)
    assert answers(Engine(replace(config, compiled=tmp_path / "graph")), requests) == expected
