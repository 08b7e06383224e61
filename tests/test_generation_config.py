"""What ends an answer: the tokens of config.json and of generation_config.json."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hub import running_hub
from tiny import TinyPair
from tiny.kimi import tiny_kimi
from transformers import GenerationConfig, LlamaConfig

from unispec.checkpoints.generation_config import read_eos_token_ids, read_generation_config
from unispec.engine import Engine, EngineConfig
from unispec.engine.sampling_defaults import sampling_params


def write(folder: Path, name: str, **changes: Any) -> None:
    """Sets keys of one of the folder's JSON files; it need not be there."""
    file = folder / name
    stated = json.loads(file.read_text()) if file.is_file() else {}
    file.write_text(json.dumps(stated | changes))


@pytest.mark.parametrize(
    ("config", "generation", "expected"),
    [
        (2, None, {2}),
        (2, {}, {2}),
        (2, {"eos_token_id": None, "temperature": 0.5}, {2}),
        (2, {"eos_token_id": 9}, {2, 9}),
        (2, {"eos_token_id": [9, 2, 255]}, {2, 9, 255}),
        ([2, 3], {"eos_token_id": 0}, {0, 2, 3}),
        (None, {"eos_token_id": [7]}, {7}),
        (None, None, set()),
    ],
)
def test_both_files_say_what_ends_an_answer(
    tmp_path: Path, config: Any, generation: dict[str, Any] | None, expected: set[int]
) -> None:
    if generation is not None:
        write(tmp_path, "generation_config.json", **generation)
    hf = LlamaConfig(vocab_size=256, eos_token_id=config)
    assert read_eos_token_ids(str(tmp_path), hf) == expected


@pytest.mark.parametrize("name", ["llama_eagle", "deepseek_mtp_agreeing", "kimi"])
def test_an_engine_ends_where_its_checkpoint_says(
    tiny_pair: Callable[[str], TinyPair], tmp_path: Path, name: str
) -> None:
    """A Llama, a DeepSeek-V3 and a Kimi K2.5, as transformers writes the file."""
    folder = tmp_path / "target"
    if name == "kimi":
        tiny_kimi(folder)
    else:
        shutil.copytree(tiny_pair(name).target, folder)
    before = Engine(EngineConfig(model=str(folder))).eos_token_ids
    assert 77 not in before
    GenerationConfig(eos_token_id=[77, 78], do_sample=True).save_pretrained(folder)
    assert Engine(EngineConfig(model=str(folder))).eos_token_ids == before | {77, 78}


@pytest.mark.parametrize(("whole", "expected"), [(2, {2}), (None, {40})])
def test_the_part_for_the_text_is_read_where_the_whole_says_nothing(
    tmp_path: Path, whole: int | None, expected: set[int]
) -> None:
    folder = tiny_kimi(tmp_path)
    text = json.loads((folder / "config.json").read_text())["text_config"] | {"eos_token_id": 40}
    write(folder, "config.json", text_config=text, eos_token_id=whole)
    assert Engine(EngineConfig(model=str(folder))).eos_token_ids == expected


def test_a_repository_may_have_the_file_or_not(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for name in ("model", "other"):
        (tmp_path / name).mkdir()
    write(tmp_path / "model", "generation_config.json", eos_token_id=5)
    with running_hub(monkeypatch, tmp_path / "cache") as hub:
        hub.repositories |= {f"some/{name}": tmp_path / name for name in ("model", "other")}
        for _ in range(2):
            assert read_generation_config("some/model") == {"eos_token_id": 5}
            assert read_generation_config("some/other") == {}
            hub.go_down()


def test_what_ends_an_answer_is_no_stop_token_of_a_request() -> None:
    """Else `ignore_eos` would not ignore it."""
    assert sampling_params({"eos_token_id": [2, 5]}, ignore_eos=True).stop_token_ids is None
    params = sampling_params({"eos_token_id": 2}, stop_token_ids=[7])
    assert params.stop_token_ids == [7]
