"""`unispec convert`: pickled checkpoints become safetensors, and nothing in them is run."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result
from hub import running_hub
from safetensors.torch import load_file
from tiny import TinyPair, tiny_eagle3

from unispec.cli import unispec
from unispec.engine import Engine, EngineConfig
from unispec.errors import InputError


def run(*arguments: object) -> Result:
    return CliRunner().invoke(unispec, ["convert", *map(str, arguments)], catch_exceptions=False)


def assert_refused(result: Result, *words: str) -> None:
    """Asserts status 2 and one line on stderr that holds these words."""
    assert (result.exit_code, result.stdout) == (2, "")
    (line,) = result.stderr.splitlines()
    assert line.startswith("error: ")
    for word in words:
        assert word in line


@pytest.fixture
def pickled(tiny_pair: Callable[[str], TinyPair], tmp_path: Path) -> Path:
    """The draft of `llama_eagle` as it would be published: pytorch_model.bin and config.json."""
    sound = tiny_pair("llama_eagle").draft
    assert sound is not None
    folder = tmp_path / "pickled"
    folder.mkdir()
    tensors = load_file(sound / "model.safetensors")
    torch.save(tensors, folder / "pytorch_model.bin")
    (folder / "config.json").write_bytes((sound / "config.json").read_bytes())
    (folder / "README.md").write_text("# A draft\n")
    (folder / "optimizer.pt").write_bytes(b"large")
    return folder


def test_a_draft_is_converted_and_runs(
    pickled: Path, tmp_path: Path, tiny_pair: Callable[[str], TinyPair]
) -> None:
    output = tmp_path / "new" / "draft"
    result = run(pickled, output)
    assert (result.exit_code, result.stderr) == (0, "")
    assert result.stdout == f"Written to {output}: 9 tensors, an EAGLE draft\n"
    names = {"README.md", "config.json", "model.safetensors"}
    assert {path.name for path in output.iterdir()} == names
    found = load_file(output / "model.safetensors")
    expected = torch.load(pickled / "pytorch_model.bin", weights_only=True)
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor)
        assert found[name].dtype == tensor.dtype
    assert output.stat().st_mode & 0o777 == 0o755
    Engine(
        EngineConfig(
            model=str(tiny_pair("llama_eagle").target),
            draft_model=str(output),
            speculative_method="eagle",
            max_length=256,
        )
    )


def test_an_eagle3_draft_of_its_authors_is_converted_and_runs(
    tmp_path: Path, tiny_pair: Callable[[str], TinyPair]
) -> None:
    """`d2t` of integers, `t2d` of booleans, and the config.json of a Llama."""
    target = tiny_pair("qwen3_eagle3").target
    folder = tiny_eagle3(tmp_path / "pickled", target, dialect="authors", seed=1)
    tensors = load_file(folder / "model.safetensors")
    torch.save(tensors, folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    config: dict[str, Any] = {
        "model": str(target),
        "speculative_method": "eagle",
        "max_length": 256,
    }
    with pytest.raises(InputError, match=f"convert it with `unispec convert {folder} FOLDER`"):
        Engine(EngineConfig(draft_model=str(folder), **config))
    output = tmp_path / "draft"
    result = run(folder, output)
    assert (result.exit_code, result.stderr) == (0, "")
    assert result.stdout == f"Written to {output}: {len(tensors)} tensors, an EAGLE-3 draft\n"
    found = load_file(output / "model.safetensors")
    assert {name: t.dtype for name, t in found.items()} == {n: t.dtype for n, t in tensors.items()}
    assert all(torch.equal(found[name], tensor) for name, tensor in tensors.items())
    assert Engine(EngineConfig(draft_model=str(output), **config)).speculative_method == "eagle3"


def test_the_old_format_of_torch_save(pickled: Path, tmp_path: Path) -> None:
    tensors = {"fc.weight": torch.randn(4, 8), "d2t": torch.arange(3)}
    torch.save(tensors, pickled / "pytorch_model.bin", _use_new_zipfile_serialization=False)
    assert run(pickled, tmp_path / "draft").exit_code == 0
    found = load_file(tmp_path / "draft/model.safetensors")
    assert all(torch.equal(found[name], tensor) for name, tensor in tensors.items())


def test_shards_stay_shards(pickled: Path, tmp_path: Path) -> None:
    (pickled / "pytorch_model.bin").unlink()
    tensors = {name: torch.randn(2, 4) for name in "abc"}
    places = {"a": "pytorch_model-2.bin", "b": "pytorch_model-1.bin", "c": "pytorch_model-1.bin"}
    for place in set(places.values()):
        shard = {name: tensors[name] for name in places if places[name] == place}
        torch.save(shard, pickled / place)
    index = pickled / "pytorch_model.bin.index.json"
    index.write_text(json.dumps({"weight_map": places}))
    output = tmp_path / "model"
    assert run(pickled, output).exit_code == 0
    found = json.loads((output / "model.safetensors.index.json").read_text())["weight_map"]
    assert found.keys() == tensors.keys()
    for name, place in found.items():
        assert torch.equal(load_file(output / place)[name], tensors[name])
    assert not (output / index.name).exists()
    (pickled / "pytorch_model-2.bin").unlink()
    words = [f"{index.name} of {pickled}", "names pytorch_model-2.bin, which is not there"]
    assert_refused(run(pickled, tmp_path / "other"), *words, "download")
    for place in ("../pytorch_model-1.bin", "config.json", "", None):
        index.write_text(json.dumps({"weight_map": {"a": place}}))
        assert_refused(run(pickled, tmp_path / "other"), index.name, f"{place}", "download")


def test_tensors_that_share_memory_or_are_views(pickled: Path, tmp_path: Path) -> None:
    table = torch.randn(6, 4)
    tensors = {"head": table, "embedding": table, "turned": table.T, "part": table[1:3]}
    torch.save(tensors, pickled / "pytorch_model.bin")
    assert run(pickled, tmp_path / "draft").exit_code == 0
    found = load_file(tmp_path / "draft/model.safetensors")
    assert all(torch.equal(found[name], tensor) for name, tensor in tensors.items())


def test_an_output_that_is_there_is_left_alone(pickled: Path, tmp_path: Path) -> None:
    output = tmp_path / "draft"
    output.mkdir()
    assert run(pickled, output).exit_code == 0
    before = (output / "model.safetensors").stat()
    assert_refused(run(pickled, output), str(output), "not empty", "another folder")
    assert (output / "model.safetensors").stat() == before
    assert_refused(run(pickled, pickled), "not empty")
    assert_refused(run(pickled, pickled / "config.json"), "config.json", "another folder")


class Attack:
    """Makes a folder when it is unpickled by Python's own pickle."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.folder),)


@pytest.mark.parametrize("modern", [True, False])
def test_a_pickle_that_runs_code_is_not_opened(pickled: Path, tmp_path: Path, modern: bool) -> None:
    torch.save(
        {"fc.weight": torch.ones(2), "more": Attack(tmp_path / "attacked")},
        pickled / "pytorch_model.bin",
        _use_new_zipfile_serialization=modern,
    )
    result = run(pickled, tmp_path / "draft")
    assert_refused(result, "pytorch_model.bin", "posix.mkdir", "may run code", "safetensors")
    assert {path.name for path in tmp_path.iterdir()} == {"pickled"}


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda file: file.write_bytes(file.read_bytes()[:-500]), ["damaged", "download"]),
        (lambda file: file.write_bytes(b""), ["damaged", "download"]),
        (lambda file: file.write_bytes(b"PK\x03\x04" + b"\0" * 60), ["damaged", "download"]),
        (lambda file: file.write_text("version https://git-lfs.github.com"), ["pytorch_model.bin"]),
        (lambda file: torch.save([torch.ones(2)], file), ["list", "no named tensors"]),
        (lambda file: torch.save({}, file), ["no named tensors"]),
        (lambda file: torch.save({"epoch": 3}, file), ["'epoch'", "int", "no tensor"]),
        (lambda file: torch.save({"a": {"b": torch.ones(2)}}, file), ["'a'", "no tensor"]),
        (lambda file: torch.save({"a": torch.ones(2).to_sparse()}, file), ["'a'", "sparse"]),
        (lambda file: torch.save({"a": torch.ones(2) * 1j}, file), ["'a'", "complex"]),
        (lambda file: file.unlink(), ["no pytorch_model.bin"]),
    ],
    ids=[
        *("cut", "empty", "no archive", "Git LFS", "list", "nothing", "number", "nested"),
        *("sparse", "complex", "missing"),
    ],
)
def test_a_file_that_cannot_be_converted(
    pickled: Path, tmp_path: Path, damage: Callable[[Path], object], words: list[str]
) -> None:
    damage(pickled / "pytorch_model.bin")
    assert_refused(run(pickled, tmp_path / "draft"), *words)
    assert {path.name for path in tmp_path.iterdir()} == {"pickled"}


def test_safetensors_need_no_conversion(
    tiny_pair: Callable[[str], TinyPair], tmp_path: Path
) -> None:
    assert_refused(run(tiny_pair("llama_eagle").draft, tmp_path / "draft"), "needs no conversion")


def test_without_torch(pickled: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("unispec.commands.libraries.find_spec", lambda name: None)
    assert_refused(run(pickled, tmp_path / "draft"), "torch is not installed", "`train` extra")


def test_a_repository_is_converted(
    pickled: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What it is read from is downloaded, and no file of a training."""
    with running_hub(monkeypatch, tmp_path / "cache") as hub:
        hub.repositories["them/draft"] = pickled
        output = tmp_path / "draft"
        assert run("them/draft", output).exit_code == 0
        names = {"README.md", "config.json", "model.safetensors"}
        assert {path.name for path in output.iterdir()} == names
        assert set(hub.downloads()) == {"README.md", "config.json", "pytorch_model.bin"}
        assert not (output / "model.safetensors").is_symlink()
        assert_refused(run("them/other", tmp_path / "other"), "them/other")
        hub.go_down()
        assert run("them/draft", tmp_path / "from the cache").exit_code == 0


def test_a_folder_that_is_not_there(tmp_path: Path) -> None:
    assert_refused(run(tmp_path / "none", tmp_path / "draft"), "none does not exist")


def test_what_was_converted_is_named(pickled: Path, tmp_path: Path) -> None:
    """So that nobody waits for a draft which cannot run."""
    torch.save({"midlayer.hidden_norm.weight": torch.ones(4)}, pickled / "pytorch_model.bin")
    result = run(pickled, tmp_path / "draft")
    assert "1 tensors, an EAGLE-3 draft\n" in result.stdout
