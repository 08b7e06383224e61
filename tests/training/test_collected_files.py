"""Example answers on the disk: damaged, grown, or with gaps."""

from __future__ import annotations

import errno
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from small_training import PROMPTS, SETTINGS, SHAPES

from unispec.errors import InputError
from unispec.training import CollectSettings, TorchTarget, collect, make_draft
from unispec.training.collection import read_num_shards

pytestmark = pytest.mark.usefixtures("one_thread")


def test_a_full_disk(target: TorchTarget, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    settings = CollectSettings(tokens=10, **SETTINGS)
    with pytest.raises(
        InputError, match=r"shard-00000.* cannot be written \(No space left.*make room"
    ):
        collect(target, PROMPTS, settings, tmp_path)
    assert not list(tmp_path.glob("*.part"))


def test_a_damaged_shard(target: TorchTarget, tmp_path: Path) -> None:
    settings = CollectSettings(tokens=10, **SETTINGS)
    collect(target, PROMPTS, settings, tmp_path)
    shard = tmp_path / "shard-00000.safetensors"
    whole = shard.read_bytes()
    shard.write_bytes(whole[:20])
    with pytest.raises(InputError, match=r"shard-00000\.safetensors is damaged"):
        collect(target, PROMPTS, settings, tmp_path)

    shard.write_bytes(whole)
    with safe_open(shard, framework="pt") as file:
        texts = file.metadata()["prompts"]
    tensors = load_file(shard)
    lengths, prompt_lengths = tensors["lengths"], tensors["prompt_lengths"]
    for changed, prompts in [
        ({"lengths": lengths[1:].clone()}, texts),
        ({"lengths": lengths + 1}, texts),
        ({"lengths": lengths[:, None].clone()}, texts),
        ({"prompt_lengths": lengths.clone()}, texts),
        ({"prompt_lengths": prompt_lengths - 1000}, texts),
        ({"held_out": tensors["held_out"] + 2}, texts),
        ({"tokens": tensors["tokens"][1:].clone()}, texts),
        ({"features": tensors["features"][1:].clone()}, texts),
        ({}, None),
        ({}, "7"),
        ({}, "[7]"),
        ({}, "[" * 100_000),
        ({}, json.dumps(json.loads(texts)[1:])),
    ]:
        save_file(tensors | changed, shard, None if prompts is None else {"prompts": prompts})
        with pytest.raises(
            InputError, match=r"^\S*shard-00000\.safetensors is damaged \(.*\): .*$"
        ):
            collect(target, PROMPTS, settings, tmp_path)
    save_file({name: tensors[name] for name in tensors if name != "features"}, shard)
    with pytest.raises(InputError, match=r"shard-00000\.safetensors is damaged"):
        collect(target, PROMPTS, settings, tmp_path)

    outside = torch.where(torch.arange(len(tensors["tokens"])) == 3, 256, tensors["tokens"])
    save_file(tensors | {"tokens": outside.int()}, shard, {"prompts": texts})
    found = collect(target, PROMPTS, settings, tmp_path)
    with pytest.raises(InputError, match=r"damaged \(token 256 is not one of the target's 256\)"):
        make_draft(target, found, SHAPES["eagle"], seed=1)


@pytest.mark.parametrize("content", ["", "[]", "{", '{"a": ' * 50_000, "\x00"])
def test_a_damaged_list_of_settings(target: TorchTarget, tmp_path: Path, content: str) -> None:
    settings = CollectSettings(tokens=10, **SETTINGS)
    collect(target, PROMPTS, settings, tmp_path)
    (tmp_path / "collection.json").write_text(content)
    with pytest.raises(InputError, match=r"^\S*collection\.json is .*: give another folder$"):
        collect(target, PROMPTS, settings, tmp_path)


@pytest.mark.parametrize(
    "content", ["", "7", "{}", '{"shards": "1"}', '{"shards": 0}', "[" * 50_000]
)
def test_a_damaged_count_of_shards(tmp_path: Path, content: str) -> None:
    path = tmp_path / "collected.json"
    path.write_text('{"shards": 12}')
    assert read_num_shards(path) == 12
    path.write_text(content)
    with pytest.raises(InputError, match=r"^\S*collected\.json .*: delete it and resume$"):
        read_num_shards(path)


def test_a_gap_is_filled_and_what_lies_behind_it_stays(target: TorchTarget, tmp_path: Path) -> None:
    settings = CollectSettings(tokens=3500, **SETTINGS)
    whole = collect(target, PROMPTS, settings, tmp_path)
    assert whole.num_shards >= 2
    first, last = tmp_path / "shard-00000.safetensors", whole.training[-1].shard
    kept, written = first.read_bytes(), last.stat().st_mtime_ns
    first.unlink()
    again = collect(target, PROMPTS, settings, tmp_path)
    assert first.read_bytes() == kept
    assert again.training == whole.training
    assert last.stat().st_mtime_ns == written


def test_a_fit_keeps_the_data_that_it_began_with(target: TorchTarget, tmp_path: Path) -> None:
    settings = CollectSettings(tokens=1, **SETTINGS)
    few = collect(target, PROMPTS, settings, tmp_path)
    grown = collect(target, PROMPTS, replace(settings, tokens=3500), tmp_path)
    assert grown.num_shards > few.num_shards == 1
    assert collect(target, PROMPTS, settings, tmp_path, shards=1).training == few.training
    with pytest.raises(InputError, match="of the 9 shards that the fit began with"):
        collect(target, PROMPTS, settings, tmp_path, shards=9)
