"""Models of the Hugging Face hub: downloaded once, used without a network, refused in words."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from hub import Hub, Refusal, running_hub
from huggingface_hub import constants
from max.engine import InferenceSession
from safetensors.torch import load_file, save_file
from tiny import Dialect, TinyPair, tiny_eagle3

from unispec.checkpoints.repository import find_file
from unispec.engine import Engine, EngineConfig
from unispec.engine.model_files import draft_paths, drafted_method
from unispec.errors import InputError
from unispec.training import TorchTarget

NAME = "them/model"


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    """A hub with the repository `NAME`, whose folder is `tmp_path / "model"`."""
    with running_hub(monkeypatch, tmp_path / "cache") as running:
        folder = tmp_path / "model"
        folder.mkdir()
        (folder / "config.json").write_text("{}")
        running.repositories[NAME] = folder
        yield running


def refusal(model: str, name: str = "config.json") -> str:
    with pytest.raises(InputError) as refused:
        find_file(model, name)
    return str(refused.value)


def test_a_file_is_found_in_a_folder_and_in_a_repository_alike(hub: Hub, tmp_path: Path) -> None:
    assert find_file(str(tmp_path / "model"), "config.json") == tmp_path / "model" / "config.json"
    assert find_file(str(tmp_path / "model"), "other.json") is None
    found = find_file(NAME, "config.json")
    assert found is not None
    assert (found.name, found.read_text()) == ("config.json", "{}")
    assert find_file(NAME, "other.json") is None
    find_file(NAME, "config.json")
    assert hub.downloads() == ["config.json"]


def test_a_file_that_changed_is_downloaded_again(hub: Hub, tmp_path: Path) -> None:
    find_file(NAME, "config.json")
    (tmp_path / "model" / "config.json").write_text("[]")
    found = find_file(NAME, "config.json")
    assert found is not None and found.read_text() == "[]"


def test_without_a_network_the_cache_is_used(hub: Hub) -> None:
    online = [find_file(NAME, name, needed=True) for name in ("config.json", "other.json")]
    hub.go_down()
    assert not constants.HF_HUB_OFFLINE
    offline = [find_file(NAME, name, needed=True) for name in ("config.json", "other.json")]
    assert offline == online
    assert offline[1] is None


def test_without_a_network_nobody_knows_what_was_never_asked_for(hub: Hub) -> None:
    find_file(NAME, "config.json")
    hub.go_down()
    assert find_file(NAME, "other.json") is None
    with pytest.raises(InputError, match=r"them/model.*other\.json .*nor does its cache.*network"):
        find_file(NAME, "other.json", needed=True)


def test_a_cached_file_of_a_repository_that_is_closed_now(hub: Hub) -> None:
    found = find_file(NAME, "config.json")
    hub.repositories[NAME] = Refusal(403, "GatedRepo", "Access is restricted.")
    assert find_file(NAME, "config.json") == found


def test_a_licence_that_is_not_accepted_yet(hub: Hub) -> None:
    page = f"{hub.endpoint}/{NAME}"
    hub.repositories[NAME] = Refusal(
        403,
        "GatedRepo",
        f"Access to model {NAME} is restricted and you are not in the authorized list. Visit"
        f" {page} to ask for access.",
    )
    said = refusal(NAME)
    assert f"ask for access at {page}" in said
    assert "log in" not in said


def test_a_licence_and_no_login(hub: Hub) -> None:
    hub.repositories[NAME] = Refusal(401, "GatedRepo", f"Access to model {NAME} is restricted.")
    said = refusal(NAME)
    assert f"ask for access at {hub.endpoint}/{NAME}," in said
    assert "log in with `hf auth login`" in said


def test_a_repository_that_is_not_there(hub: Hub) -> None:
    said = refusal("them/nothing")
    assert "them/nothing is neither a local folder nor a repository" in said
    assert "check the path" in said


def test_a_repository_that_the_hub_disabled(hub: Hub) -> None:
    hub.repositories[NAME] = Refusal(403, "", "Access to this resource is disabled.")
    assert f"the hub has disabled the repository {NAME}" in refusal(NAME)


@pytest.mark.parametrize("name", ["them/model@main", "them/GGUF:Q4_K_M", "them/.model"])
def test_a_name_that_no_repository_can_have(name: str) -> None:
    assert f"{name} is no local folder and no name that a repository" in refusal(name)


# Targets and drafts


class CompileReachedError(BaseException):
    """Nothing on the way catches it."""


@pytest.fixture
def pair(hub: Hub, tiny_pair: Callable[[str], TinyPair], tmp_path: Path) -> dict[str, Path]:
    """The folders of a float16 target and its float16 draft, which the hub has."""
    sound = tiny_pair("llama_eagle")
    assert sound.draft is not None
    for name, folder in (("target", sound.target), ("draft", sound.draft)):
        shutil.copytree(folder, tmp_path / name)
        weights = tmp_path / name / "model.safetensors"
        save_file({key: value.half() for key, value in load_file(weights).items()}, weights)
        hub.repositories[f"them/{name}"] = tmp_path / name
    return {name: tmp_path / name for name in ("target", "draft")}


def engine() -> Engine:
    return Engine(
        EngineConfig(model="them/target", draft_model="them/draft", speculative_method="eagle")
    )


def test_float16_repositories_load_as_folders_do_and_then_without_a_network(
    pair: dict[str, Path], hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    def load(*arguments: object, **options: object) -> None:
        raise CompileReachedError

    monkeypatch.setattr(InferenceSession, "load", load)
    with pytest.raises(CompileReachedError):
        engine().pipeline  # noqa: B018
    hub.go_down()
    engine()  # finds every file, the weights included


@pytest.mark.parametrize("part", ["target", "draft"])
def test_a_damage_names_the_repository_as_the_user_does(pair: dict[str, Path], part: str) -> None:
    file = pair[part] / "config.json"
    sound = file.read_text()
    file.write_text(json.dumps(json.loads(sound) | {"hidden_act": "gelu"}))
    with pytest.raises(InputError, match=f"'gelu' of them/{part} "):
        engine()
    file.write_text(sound)
    (pair[part] / "model.safetensors").rename(pair[part] / "pytorch_model.bin")
    with pytest.raises(InputError, match=f"^them/{part} holds no .*`unispec convert them/{part} "):
        engine()


def test_weights_are_downloaded_when_all_else_is_right(pair: dict[str, Path], hub: Hub) -> None:
    (pair["target"] / "tokenizer.json").write_text("{}")
    with pytest.raises(InputError, match="tokenizer"):
        engine()
    assert "model.safetensors" not in hub.downloads()


def test_a_draft_is_trained_for_a_repository(pair: dict[str, Path], hub: Hub) -> None:
    online = TorchTarget("them/target")
    hub.go_down()
    assert torch.equal(TorchTarget("them/target").head, online.head)


def test_looking_for_a_path_imports_nothing_heavy() -> None:
    program = (
        "import sys; from unispec.checkpoints.repository import find_file;"
        "find_file('/', 'config.json');"
        "assert not {'max', 'numpy', 'transformers', 'gguf'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


@pytest.mark.parametrize("dialect", ["authors", "specforge", "speculators"])
def test_weights_are_downloaded_where_only_they_say_which_eagle_a_draft_is(
    tiny_pair: Callable[[str], TinyPair], hub: Hub, tmp_path: Path, dialect: Dialect
) -> None:
    """The authors' config.json is that of a Llama."""
    target = tiny_pair("qwen3_eagle3").target
    hub.repositories["them/draft"] = tiny_eagle3(tmp_path / "draft", target, dialect=dialect)
    config = EngineConfig(model=str(target), draft_model="them/draft", speculative_method="eagle")
    assert drafted_method(config, draft_paths(config)) == "eagle3"
    expected = ["config.json"] + ["model.safetensors"] * (dialect == "authors")
    assert hub.downloads() == expected
