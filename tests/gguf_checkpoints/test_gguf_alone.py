"""A GGUF file as the whole model, a file in parts, and one beside a config.json that differs."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from gguf_files import gguf_name, refused, rope_divisors, tiny_llama, write_gguf
from max.engine import InferenceSession

from unispec.checkpoints import check_weight_files, read_gguf, read_tensors
from unispec.checkpoints.gguf_folder import DESCRIPTION
from unispec.checkpoints.repository import resolve_model, weight_files
from unispec.cli import unispec
from unispec.engine import Engine, EngineConfig
from unispec.engine.pipeline_config import make_pipeline_config
from unispec.pipelines.runtime.weights import read_weights


@pytest.fixture(autouse=True)
def cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setenv("UNISPEC_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "gguf"


# --- files in parts --------------------------------------------------------------------


@pytest.mark.parametrize("max_tensors", [20, 8, 1])
def test_parts_are_the_whole_file(tmp_path: Path, max_tensors: int) -> None:
    """The parts are those of llama.cpp's own writer."""
    whole = read_gguf(write_gguf(tmp_path / "whole.gguf"))
    first = write_gguf(tmp_path / "parts.gguf", max_tensors=max_tensors)
    parts = sorted(tmp_path.glob("parts-*.gguf"))
    assert len(parts) == -(-len(whole.tensors) // max_tensors) > 1
    assert first == parts[0]
    for given in (parts[0], parts[-1]):
        found = read_gguf(given)
        assert found.config == whole.config
        assert found.tokenizer().to_str() == whole.tokenizer().to_str()
        assert list(found.tensors) == list(whole.tensors)
        for name, tensor in found.tensors.items():
            np.testing.assert_array_equal(tensor, whole.tensors[name])
    for paths in (parts, parts[::-1], parts[:1], parts[1:2]):
        check_weight_files(paths)
        assert read_tensors(paths).keys() == {gguf_name(name) for name in whole.tensors}


def test_a_part_is_missing(tmp_path: Path) -> None:
    first = write_gguf(tmp_path / "a.gguf", max_tensors=8)
    (tmp_path / "a-00002-of-00003.gguf").unlink()
    for paths in ([first], [first, tmp_path / "a-00003-of-00003.gguf"]):
        with refused("a-00002-of-00003.gguf is not there", "part 2 of 3", "download all parts"):
            check_weight_files(paths)


def test_parts_under_other_names(tmp_path: Path) -> None:
    first = write_gguf(tmp_path / "a.gguf", max_tensors=8)
    renamed = shutil.copy(first, tmp_path / "renamed.gguf")
    with refused("renamed.gguf is one of 3 parts", "-00001-of-00003.gguf"):
        check_weight_files([renamed])
    shutil.copy(tmp_path / "a-00003-of-00003.gguf", tmp_path / "a-00002-of-00003.gguf")
    with refused("a-00002-of-00003.gguf has split.no 2", "its name says 1"):
        check_weight_files([first])


@pytest.mark.parametrize("number", ["00000-of-00000", "00000-of-00002", "00003-of-00002"])
def test_a_name_with_a_number_that_no_part_has(tmp_path: Path, number: str) -> None:
    """Parts count from 1: such a file is a whole one."""
    path = write_gguf(tmp_path / "a.gguf").rename(tmp_path / f"m-{number}.gguf")
    check_weight_files([path])
    assert read_gguf(path).tensors
    for model in (path, tmp_path):
        folder = resolve_model(str(model))
        assert [file.resolve() for file in weight_files(str(folder))] == [path]


def test_parts_of_different_models(tmp_path: Path) -> None:
    first = write_gguf(tmp_path / "a.gguf", max_tensors=8)
    more = {f"extra{n}": np.ones(32, np.float32) for n in range(3)}
    write_gguf(tmp_path / "b.gguf", max_tensors=8, tensors=more)
    second = tmp_path / "a-00002-of-00003.gguf"
    shutil.copy(tmp_path / "b-00003-of-00003.gguf", tmp_path / "a-00003-of-00003.gguf")
    with refused("a-00001-of-00003.gguf states 21 tensors", "have 24"):
        check_weight_files([first])
    second.write_bytes(
        first.read_bytes().replace(b"split.no\x02\0\0\0\0\0", b"split.no\x02\0\0\0\1\0")
    )
    with refused("'token_embd.weight' is in both", str(first), str(second), "one model"):
        check_weight_files([first])


# --- a file alone ----------------------------------------------------------------------


def alone(tmp_path: Path, **arguments: Any) -> Path:
    return write_gguf(tmp_path / "model.gguf", **arguments)


def in_parts(tmp_path: Path, **arguments: Any) -> Path:
    return write_gguf(tmp_path / "model.gguf", max_tensors=8, **arguments)


def folder_of(make: Callable[..., Path]) -> Callable[..., Path]:
    def folder(tmp_path: Path, **arguments: Any) -> Path:
        (tmp_path / "folder").mkdir()
        return make(tmp_path / "folder", **arguments).parent

    return folder


FORMS = {
    "file": alone,
    "first part": in_parts,
    "folder with a file": folder_of(alone),
    "folder with parts": folder_of(in_parts),
}


@pytest.mark.parametrize("form", FORMS)
def test_a_gguf_file_is_a_model(tmp_path: Path, cache: Path, form: str) -> None:
    llama = tiny_llama()
    given = FORMS[form](tmp_path, model=llama, metadata={"tokenizer.chat_template": "{{ 1 }}"})
    config = EngineConfig(model=str(given))
    engine = Engine(config)
    assert engine.eos_token_ids == {257}
    assert engine.max_length == 512
    assert engine.tokenizer("x<tool> the").input_ids == [ord("x"), 258, 261]
    assert engine.tokenizer.chat_template == "{{ 1 }}"
    assert (engine.tokenizer.bos_token, engine.tokenizer.eos_token) == ("<bos>", "<eos>")
    tensors, source = read_weights(make_pipeline_config(config).model)
    assert source == str(given)
    for name, parameter in llama.named_parameters():
        np.testing.assert_array_equal(tensors[name], parameter.detach(), err_msg=name)
    (folder,) = cache.iterdir()
    assert {path.name for path in folder.iterdir() if not path.is_symlink()} == {*DESCRIPTION}


def test_the_command_takes_a_gguf_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class CompileReachedError(BaseException):
        pass

    def load(*arguments: object, **options: object) -> None:
        raise CompileReachedError

    monkeypatch.setattr(InferenceSession, "load", load)
    monkeypatch.setattr(InferenceSession, "load_all", load)
    flags = ["generate", "--model", str(alone(tmp_path)), "--prompt", "the", "--raw"]
    with pytest.raises(CompileReachedError):
        CliRunner().invoke(unispec, flags[:-1], catch_exceptions=False)


def test_the_description_is_written_once_for_each_file(tmp_path: Path, cache: Path) -> None:
    path = alone(tmp_path)
    folder = Path(resolve_model(str(path)))
    written = {file.name: file.stat().st_mtime_ns for file in folder.iterdir()}
    assert resolve_model(str(path)) == folder
    assert {file.name: file.stat().st_mtime_ns for file in folder.iterdir()} == written
    write_gguf(path, tiny_llama(rms_norm_eps=2.0**-10))
    changed = Path(resolve_model(str(path)))
    assert changed != folder
    assert json.loads((changed / "config.json").read_text())["rms_norm_eps"] == 2.0**-10
    assert {*cache.iterdir()} == {folder, changed}


def test_a_part_that_goes_is_missed(tmp_path: Path) -> None:
    first = in_parts(tmp_path)
    resolve_model(str(first))
    (tmp_path / "model-00002-of-00003.gguf").unlink()
    with refused("model-00002-of-00003.gguf is not there"):
        resolve_model(str(first))


def test_ends_of_text_and_of_turn(tmp_path: Path) -> None:
    path = alone(tmp_path, metadata={"tokenizer.ggml.eot_token_id": 258})
    engine = Engine(EngineConfig(model=str(path)))
    assert engine.eos_token_ids == {257, 258}
    assert engine.tokenizer.eos_token == "<eos>"


def test_a_tokenizer_that_is_not_supported_leaves_no_folder(tmp_path: Path, cache: Path) -> None:
    path = alone(tmp_path, tokenizer_model="llama")
    with refused(str(path), "'llama'", "own config.json and tokenizer.json"):
        resolve_model(str(path))
    assert not [*cache.iterdir()]


def test_a_cache_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("UNISPEC_CACHE", str(tmp_path / "file"))
    with refused(str(tmp_path / "file"), "cannot be written", "UNISPEC_CACHE"):
        resolve_model(str(alone(tmp_path)))


def test_several_models_in_a_folder(tmp_path: Path) -> None:
    for name in ("a.gguf", "b.gguf"):
        write_gguf(tmp_path / name)
    with refused(str(tmp_path), "no config.json", "a.gguf, b.gguf", "give such a file"):
        Engine(EngineConfig(model=str(tmp_path)))


# --- a config.json beside it -----------------------------------------------------------


def described(tmp_path: Path, **changes: Any) -> Path:
    """A folder with what the file describes, but for these changes to config.json."""
    made = Path(resolve_model(str(tmp_path / "model.gguf")))
    folder = tmp_path / "described"
    folder.mkdir()
    for name in DESCRIPTION:
        shutil.copy(made / name, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))
    return folder


LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 20000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"rms_norm_eps": 1e-5}, ["rms_norm_eps 1.525879e-05", "1e-05"]),
        ({"rope_parameters": {"rope_theta": 1e4, "rope_type": "default"}}, ["20000", "10000"]),
        ({"rope_parameters": None, "rope_theta": 5e5}, ["rope_theta 20000", "500000"]),
        ({"rope_parameters": LLAMA3}, ["rope_type 'default'", "'llama3'"]),
        ({"num_attention_heads": 8, "head_dim": 16}, ["num_attention_heads 4", "8"]),
        ({"num_key_value_heads": 4}, ["num_key_value_heads 2", "4"]),
    ],
)
def test_a_config_that_contradicts_the_file(
    tmp_path: Path, changes: dict[str, Any], words: list[str]
) -> None:
    path = alone(tmp_path)
    folder = described(tmp_path, **changes)
    with refused(f"{path} has", f"config.json of {folder} has", "belongs to the file", *words):
        make_pipeline_config(EngineConfig(model=str(folder), weight_path=(path,)))


def test_another_factor_of_the_same_scaling(tmp_path: Path) -> None:
    divisors = {"rope_freqs.weight": rope_divisors(32.0, theta=20000.0)}
    path = alone(tmp_path, tensors=divisors)
    folder = described(tmp_path, rope_parameters=LLAMA3)
    with refused("factor 32", "has 8:"):
        make_pipeline_config(EngineConfig(model=str(folder), weight_path=(path,)))


@pytest.mark.parametrize("rounded", [False, True])
def test_a_config_that_agrees(tmp_path: Path, rounded: bool) -> None:
    """The file has float32, so that 1e-5 is 9.99999974e-6 there."""
    path = alone(tmp_path, model=tiny_llama(rms_norm_eps=1e-5))
    folder = described(tmp_path, **({"rms_norm_eps": 1e-5} if rounded else {}))
    make_pipeline_config(EngineConfig(model=str(folder), weight_path=(path,)))
