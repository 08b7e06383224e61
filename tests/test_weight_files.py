"""Which files of a folder or of a repository are a model's weights."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from hub import Hub, running_hub

from unispec.checkpoints.repository import find_config, weight_files
from unispec.errors import InputError

NAME = "them/model"
INDEX = "model.safetensors.index.json"
SHARDS = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
SINGLE = "model.safetensors"


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    with running_hub(monkeypatch, tmp_path / "cache") as running:
        yield running


@pytest.fixture(params=["folder", "repository"])
def model(request: pytest.FixtureRequest, hub: Hub, tmp_path: Path) -> str:
    """A model as a user names it; its files are those of `tmp_path / "model"`."""
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    hub.repositories[NAME] = folder
    return str(folder) if request.param == "folder" else NAME


def fill(folder: Path, *names: str, index: object = None) -> None:
    for name in names:
        (folder / name).write_text(name)
    if index is not None:
        (folder / INDEX).write_text(json.dumps(index))


def index_of(*files: str) -> dict[str, object]:
    return {"weight_map": {f"tensor {number}": name for number, name in enumerate(files)}}


@pytest.mark.parametrize(
    ("files", "index", "expected"),
    [
        ([SINGLE], None, [SINGLE]),
        ([SINGLE, "consolidated.safetensors", "adapter_model.safetensors"], None, [SINGLE]),
        ([*SHARDS, "consolidated.safetensors", SINGLE], index_of(*SHARDS, SHARDS[0]), SHARDS),
        (["a.safetensors", SINGLE, "c.gguf"], index_of("a.safetensors"), ["a.safetensors"]),
        (
            ["b.safetensors", "a.safetensors", "c.gguf", "d.bin"],
            None,
            ["a.safetensors", "b.safetensors"],
        ),
        (["w.gguf", "pytorch_model.bin"], None, ["w.gguf"]),
        (
            ["w-00002-of-00002.gguf", "w-00001-of-00002.gguf"],
            None,
            ["w-00001-of-00002.gguf", "w-00002-of-00002.gguf"],
        ),
    ],
)
def test_the_weights_of_a_model(
    model: str, tmp_path: Path, hub: Hub, files: list[str], index: object, expected: list[str]
) -> None:
    fill(tmp_path / "model", *files, index=index)
    (tmp_path / "model" / "original").mkdir()
    fill(tmp_path / "model" / "original", "consolidated.00.safetensors")
    found = weight_files(model)
    assert [path.name for path in found] == expected
    assert [path.read_text() for path in found] == expected
    assert all(path.is_absolute() for path in found)
    assert {path.parent for path in found} == {find_config(model).parent}
    if model == NAME:
        assert set(hub.downloads()) == {"config.json", *expected} | ({INDEX} if index else set())


def test_what_was_downloaded_is_found_without_a_network(hub: Hub, tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    hub.repositories[NAME] = tmp_path / "model"
    fill(tmp_path / "model", "config.json", "x.safetensors", *SHARDS, index=index_of(*SHARDS))
    online = weight_files(NAME)
    hub.asked.clear()
    assert weight_files(NAME) == online
    assert hub.downloads() == []
    hub.go_down()
    assert weight_files(NAME) == online


def test_a_network_that_goes_down_before_the_weights(hub: Hub, tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    hub.repositories[NAME] = tmp_path / "model"
    fill(tmp_path / "model", "config.json", SINGLE)
    find_config(NAME)
    hub.go_down()
    with pytest.raises(InputError, match=r"does not give its weights .*the network"):
        weight_files(NAME)


REFUSED = {
    "a shard is missing": (
        SHARDS[:1],
        index_of(*SHARDS),
        ["{model}", INDEX, f"names {SHARDS[1]}, which is not there", "the whole checkpoint"],
    ),
    "an index of nothing": ([SINGLE], {}, [INDEX, "{model}", "no weight_map", "again"]),
    "an index of numbers": ([SINGLE], {"weight_map": {"a": 1}}, [INDEX, "no safetensors", "again"]),
    "an index of pickles": (
        ["pytorch_model.bin"],
        index_of("pytorch_model.bin"),
        ["{model}", INDEX, "'pytorch_model.bin'", "no safetensors file"],
    ),
    "an index that leaves the folder": (
        [SINGLE],
        index_of("../other/model.safetensors"),
        ["{model}", INDEX, "../other/model.safetensors, which is not there"],
    ),
    "an index that is a list": ([SINGLE], [], [INDEX, "{model}", "JSON list", "again"]),
    "pickles": (
        ["pytorch_model.bin", "training_args.bin"],
        None,
        ["{model} holds no .safetensors", "pytorch_model.bin", "`unispec convert {model} FOLDER`"],
    ),
    "pickled shards": (
        ["pytorch_model-00001-of-00001.bin", "pytorch_model.bin.index.json"],
        None,
        ["{model} holds no .safetensors", "`unispec convert {model} FOLDER`"],
    ),
    **{
        f"only {name}": (
            [name, "README.md"],
            None,
            [f"{{model}} holds no .safetensors or .gguf file but {name}", "use the checkpoint in"],
        )
        for name in ("consolidated.00.pth", "model.pt", "model.ckpt", "training_args.bin", "a.pkl")
    },
    "several GGUF files": (
        ["m-Q4_K_M.gguf", "m-Q8_0.gguf"],
        None,
        ["{model} has 2 GGUF files", "m-Q4_K_M.gguf, m-Q8_0.gguf", "--weight-path"],
    ),
    "nothing": ([], None, ["{model} holds no .safetensors", "download or convert"]),
}


@pytest.mark.parametrize(
    ("files", "index", "words"), REFUSED.values(), ids=[name.replace(" ", "-") for name in REFUSED]
)
def test_no_weights(
    model: str, tmp_path: Path, hub: Hub, files: list[str], index: object, words: list[str]
) -> None:
    fill(tmp_path / "model", *files, index=index)
    with pytest.raises(InputError) as refused:
        weight_files(model)
    for word in words:
        assert word.replace("{model}", model) in str(refused.value)
    # It takes nothing but pytorch_model.bin.
    assert ("unispec convert" in str(refused.value)) == ("FOLDER`" in words[-1])
    assert {*hub.downloads()} <= {"config.json", INDEX}


def test_gguf_files_without_a_configuration(model: str, tmp_path: Path) -> None:
    (tmp_path / "model" / "config.json").unlink()
    fill(tmp_path / "model", "m-Q8_0.gguf", "m-Q4_K_M.gguf")
    with pytest.raises(InputError) as refused:
        find_config(model)
    assert f"{model} has no config.json, but m-Q4_K_M.gguf, m-Q8_0.gguf; " in str(refused.value)
    assert "as the model" in str(refused.value)
