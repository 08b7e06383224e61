"""What is wrong with options and files is told before MAX, torch or transformers is imported."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import save_file

SCRIPT = """
import sys
from importlib.machinery import ModuleSpec

class Refuse:
    '''Finds the three, so that they seem installed, and fails when one is imported.'''

    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {"max", "torch", "transformers"}:
            return ModuleSpec(name, self)

    def create_module(self, spec):
        raise AssertionError(f"{spec.name} is imported")

    def exec_module(self, module):
        pass

sys.meta_path.insert(0, Refuse())
from unispec.cli import main
main()
"""
CPU_SECONDS = 3.0
"""For half a second of a user's machine; importing MAX takes five and more."""


def unispec(*arguments: object) -> subprocess.CompletedProcess[str]:
    """Runs the command where none of the three can be imported, and bounds its time."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, *map(str, arguments)],
        env=os.environ | {"HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
    )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < CPU_SECONDS
    return done


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A target whose files are sound, as far as can be said at once."""
    folder = tmp_path / "target"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    save_file({"weight": np.ones(4, np.float32)}, folder / "model.safetensors")
    return folder


@pytest.mark.parametrize("command", [[], ["generate"], ["train"]])
@pytest.mark.parametrize("flag", ["--help", "-h"])
def test_help(command: list[str], flag: str) -> None:
    shown = unispec(*command, flag)
    assert (shown.returncode, shown.stderr) == (0, "")
    assert shown.stdout.startswith("Usage:")


def test_version() -> None:
    shown = unispec("--version")
    assert (shown.returncode, shown.stderr) == (0, "")
    assert shown.stdout.startswith("unispec, version ")


Damage = Callable[[Path], object]


def changed(name: str, content: bytes) -> Damage:
    return lambda folder: (folder / name).write_bytes(content)


def removed(name: str) -> Damage:
    return lambda folder: (folder / name).unlink()


def cut(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-4])


DAMAGES = [
    pytest.param(removed("config.json"), ["has no config.json"], id="no-config"),
    pytest.param(changed("config.json", b"{"), ["config.json", "JSON"], id="no-json"),
    pytest.param(changed("config.json", b"[]"), ["config.json", "object"], id="no-object"),
    pytest.param(removed("model.safetensors"), ["safetensors"], id="no-weights"),
    pytest.param(cut, ["model.safetensors"], id="cut-weights"),
    pytest.param(
        changed("model.safetensors.index.json", b'{"weight_map": {"a": "b.safetensors"}}'),
        ["b.safetensors"],
        id="no-shard",
    ),
]


def assert_refused(done: subprocess.CompletedProcess[str], *words: str) -> None:
    assert (done.returncode, done.stdout) == (2, ""), done.stderr
    message = done.stderr.splitlines()[-1]
    assert message.startswith("error: ")
    assert "Traceback" not in done.stderr
    for word in words:
        assert word in message


def test_a_model_that_is_not_there(tmp_path: Path, model: Path) -> None:
    nowhere = tmp_path / "nowhere"
    draft = ["--speculative-method", "eagle", "--draft-model-path", nowhere]
    for command in (
        ["generate", "--model", nowhere, "--prompt", "hello"],
        ["generate", "--model", model, "--prompt", "hello", *draft],
        ["train", "--model", nowhere, *draft[:2], "--output", tmp_path / "out"],
    ):
        assert_refused(unispec(*command), str(nowhere), "does not exist")


@pytest.mark.parametrize(("damage", "words"), DAMAGES)
@pytest.mark.parametrize("role", ["target", "draft", "train", "begin"])
def test_a_model_whose_files_are_damaged(
    tmp_path: Path, model: Path, role: str, damage: Damage, words: list[str]
) -> None:
    spoilt = tmp_path / "spoilt"
    spoilt.mkdir()
    for file in model.iterdir():
        (spoilt / file.name).write_bytes(file.read_bytes())
    damage(spoilt)
    draft = ["--speculative-method", "eagle"]
    done = {
        "target": lambda: unispec("generate", "--model", spoilt, "--prompt", "hello"),
        "draft": lambda: unispec(
            *("generate", "--model", model, "--prompt", "hello"),
            *("--draft-model-path", spoilt, *draft),
        ),
        "train": lambda: unispec("train", "--model", spoilt, "--output", tmp_path / "out", *draft),
        "begin": lambda: unispec(
            *("train", "--model", model, "--output", tmp_path / "out", *draft),
            *("--draft-model-path", spoilt),
        ),
    }[role]()
    assert_refused(done, str(spoilt), *words)
    assert not (tmp_path / "out").exists()


def test_a_damaged_generation_config(model: Path) -> None:
    (model / "generation_config.json").write_text("{")
    done = unispec("generate", "--model", model, "--prompt", "hello")
    assert_refused(done, "generation_config.json")


def test_weights_of_an_unknown_format(tmp_path: Path, model: Path) -> None:
    (tmp_path / "weights.bin").touch()
    weights = ["--weight-path", tmp_path / "weights.bin"]
    done = unispec("generate", "--model", model, "--prompt", "hello", *weights)
    assert_refused(done, str(tmp_path / "weights.bin"), "format")


def test_an_image_of_another_format(tmp_path: Path, model: Path) -> None:
    Image.new("RGB", (9, 9)).save(tmp_path / "cat.png", "GIF")
    image = ["--image", tmp_path / "cat.png"]
    done = unispec("generate", "--model", model, "--prompt", "hello", *image)
    assert_refused(done, str(tmp_path / "cat.png"), "PNG, JPEG or WebP")


def test_a_sound_model_gets_as_far_as_max(model: Path) -> None:
    done = unispec("generate", "--model", model, "--prompt", "hello")
    assert "AssertionError: max" in done.stderr


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("--temperature", "1e-40", "choose 0, which takes the most probable token, or 1e-37 to 2"),
        ("--repetition-penalty", "1e-7", "1e-07 is not in the range"),
        ("--repetition-penalty", "1e7", "10000000.0 is not in the range"),
        ("--top-p", "-0.1", "-0.1 is not in the range"),
        ("--top-k", str(2**63), f"{2**63} is not in the range"),
    ],
)
def test_a_sampling_parameter_that_the_engine_would_refuse(
    model: Path, option: str, value: str, message: str
) -> None:
    refused = unispec("generate", "--model", model, "--prompt", "a", option, value)
    assert_refused(refused, option, message)


@pytest.mark.parametrize(
    ("method", "tensors", "words"),
    [
        ("dflash", {"fc.weight": (8, 16)}, ["an EAGLE draft", "eagle"]),
        ("eagle", {"hidden_norm.weight": (8,)}, ["a DFlash draft", "dflash"]),
        ("dflash", {"midlayer.mlp.up_proj.weight": (8, 8)}, ["an EAGLE-3 draft", "method eagle3"]),
        ("eagle", {"model.layers.0.mlp.up_proj.weight": (8, 8), "model.norm.weight": (8,)}, []),
    ],
)
def test_a_draft_of_another_kind(
    tmp_path: Path,
    model: Path,
    method: str,
    tensors: dict[str, tuple[int, ...]],
    words: list[str],
) -> None:
    draft = tmp_path / "draft"
    draft.mkdir()
    (draft / "config.json").write_text("{}")
    zeros = {name: np.zeros(shape, np.float32) for name, shape in tensors.items()}
    save_file(zeros, draft / "model.safetensors")
    done = unispec(
        *("generate", "--model", model, "--prompt", "hello"),
        *("--draft-model-path", draft, "--speculative-method", method),
    )
    assert_refused(done, str(draft), *words)
