"""What a fit may begin with: another draft, or the state of an earlier fit."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from small_training import METHODS, PROMPTS, SETTINGS, SHAPES, card, rounded, untrained

from unispec.errors import InputError
from unispec.methods import Method
from unispec.training import (
    Collection,
    CollectSettings,
    DraftShape,
    FitSettings,
    TorchTarget,
    collect,
    fit,
    make_draft,
    publish,
)
from unispec.training.building import check_initial_draft
from unispec.training.fitting import History, Measure

pytestmark = pytest.mark.usefixtures("one_thread")


@METHODS
def test_a_fit_begins_with_another_draft(
    target: TorchTarget, collected: Callable[[Method], Collection], tmp_path: Path, method: Method
) -> None:
    """It begins at the acceptance that the other ended with, whatever tokens it proposes."""
    collection, shape = collected(method), SHAPES[method]
    first = make_draft(target, collection, replace(shape, mask_token_id=7), seed=1)
    history = fit(first, collection, FitSettings(epochs=4, learning_rate=3e-3), tmp_path / "a.pt")
    folder = tmp_path / "draft"
    folder.mkdir()
    publish(first, history, card(), folder)
    again = make_draft(target, collection, shape, seed=5, initial_draft=folder)
    onwards = fit(again, collection, FitSettings(seconds=1e-3), tmp_path / "b.pt")
    ended, began = history.measures[-1], onwards.measures[0]
    assert began.acceptance == pytest.approx(ended.acceptance, abs=0.02)  # stored in float16
    assert ended.acceptance[0] > 0.15
    fewer = make_draft(target, collection, replace(shape, vocab_size=50), 5, initial_draft=folder)
    assert len(fewer.target_ids) == 50
    rounded(first)
    assert all(map(torch.equal, fewer.parameters(), first.parameters()))
    with pytest.raises(
        InputError,
        match=r"another initial draft \(draft, sha256 \w{12}, not none\)",
    ):
        fresh = make_draft(target, collection, replace(shape, mask_token_id=7), seed=5)
        fit(fresh, collection, FitSettings(seconds=1e-3), tmp_path / "b.pt")


def test_drafts_that_no_fit_can_begin_with(target: TorchTarget, tmp_path: Path) -> None:
    shape = DraftShape(method="eagle")
    collection = collect(target, PROMPTS, CollectSettings(tokens=1, **SETTINGS), tmp_path / "data")
    draft = make_draft(target, collection, shape, seed=1)
    folder = tmp_path / "draft"
    folder.mkdir()
    publish(draft, History(measures=[Measure(0, 1.0, [0.5])]), card(), folder)
    check_initial_draft(target.config, shape, folder)

    def refused(message: str, changed: DraftShape = shape) -> None:
        with pytest.raises(InputError, match=message):
            check_initial_draft(target.config, changed, folder)

    refused(r"has num_hidden_layers 1 where this draft has 2", replace(shape, layers=2))
    dflash = DraftShape(method="dflash", layers=1)
    refused(r"config\.json has the mask token None in dflash_config", dflash)
    config = json.loads((folder / "config.json").read_text())
    for wrong in (None, [], {"mask_token_id": 256}, {"mask_token_id": "1"}):
        (folder / "config.json").write_text(json.dumps(config | {"dflash_config": wrong}))
        refused("where 0 to 255 is wanted", dflash)
    (folder / "config.json").write_text(json.dumps(config | {"num_key_value_heads": 4}))
    refused("has num_key_value_heads 4 where this draft has")
    (folder / "config.json").write_text(json.dumps(config))

    weights = folder / "model.safetensors"
    tensors = load_file(weights)
    narrow = tensors | {"fc.weight": tensors["fc.weight"][:, 1:].contiguous()}
    save_file(narrow, weights)
    refused(r"has fc\.weight \[\d+, \d+\] where this draft has \[\d+, \d+\]")
    save_file({name: tensors[name] for name in tensors if name != "fc.bias"}, weights)
    refused(r"has fc\.bias missing where this draft has \[\d+\]")
    weights.write_bytes(b"no tensors")
    refused(r"model\.safetensors is not a safetensors file")
    (folder / "config.json").write_text("[]")
    refused(r"config\.json is a JSON list and no object")
    (folder / "config.json").unlink()
    refused(r"config\.json cannot be read")


def test_a_state_of_another_draft(
    target: TorchTarget, collected: Callable[[Method], Collection], tmp_path: Path
) -> None:
    collection, state = collected("eagle"), tmp_path / "state.pt"
    fit(untrained(target, collection, "eagle"), collection, FitSettings(seconds=0.1), state)
    settings = FitSettings(seconds=0.1)
    other = make_draft(target, collection, DraftShape(method="eagle", layers=2), seed=1)
    with pytest.raises(InputError, match="is of a fit with another draft"):
        fit(other, collection, settings, state)
    fewer = make_draft(target, collection, DraftShape(method="eagle", vocab_size=50), seed=1)
    with pytest.raises(InputError, match="is of a fit with another proposed tokens"):
        fit(fewer, collection, settings, state)
    same = untrained(target, collection, "eagle")
    with pytest.raises(InputError, match=r"another epochs \(10, not 3\)"):
        fit(same, collection, FitSettings(epochs=3), state)
    whole = torch.load(state)
    state.write_bytes(state.read_bytes()[:1000])
    with pytest.raises(InputError, match=r"state\.pt is damaged"):
        fit(same, collection, settings, state)
    group = whole["optimizer"]["param_groups"][0]
    for changed in (
        7,
        [],
        {name: whole[name] for name in whole if name != "losses"},
        whole | {"identity": 7},
        whole | {"step": "one"},
        whole | {"step": whole["step"] + 1},
        whole | {"elapsed": math.nan},
        whole | {"losses": [None] * whole["step"]},
        whole | {"measures": []},
        whole | {"measures": [(10**6, 0.0, [0.0])]},
        whole | {"measures": [7]},
        whole | {"draft": {}},
        whole | {"optimizer": {"state": {}, "param_groups": [group | {"params": [0]}]}},
    ):
        torch.save(changed, state)
        with pytest.raises(InputError, match=r"^\S*state\.pt is damaged \(.*\): delete it.*$"):
            fit(same, collection, settings, state)


def test_a_state_that_cannot_be_written(
    target: TorchTarget, collected: Callable[[Method], Collection], tmp_path: Path
) -> None:
    collection = collected("eagle")
    draft, state = untrained(target, collection, "eagle"), tmp_path / "nowhere" / "state.pt"
    with pytest.raises(InputError, match=r"state\.pt cannot be written \(No such file"):
        fit(draft, collection, FitSettings(seconds=0.1), state)
