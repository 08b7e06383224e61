"""What a user installs: the wheel, its imports, its dependencies and their locked versions."""

from __future__ import annotations

import ast
import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from email.parser import Parser
from importlib.metadata import distribution, entry_points, packages_distributions
from pathlib import Path, PurePosixPath

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parent.parent
SOURCE = ROOT / "src"
SUPPORTED_PYTHONS = ("3.10", "3.11", "3.12", "3.13")
MODULES = sorted(SOURCE.rglob("*.py"))
TRAINING = SOURCE / "training"
DEPLOYMENT = SOURCE / "deployment"
OF_THE_EXTRA = (SOURCE / "commands" / "train.py", SOURCE / "checkpoints" / "pickled.py")
"""What else has the `train` extra's packages, for commands that ask for it."""
"""Both need the extra `train`, the command when it is called; nothing else may."""


def run_python(*arguments: str, cwd: Path, **environment: str) -> str:
    """What Python prints when it runs with these arguments; fails if it fails."""
    done = subprocess.run(
        [sys.executable, *arguments],
        cwd=cwd,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built from a copy so that the working tree stays clean."""
    tree = tmp_path_factory.mktemp("tree")
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tree)
    shutil.copytree(SOURCE, tree / "src", ignore=shutil.ignore_patterns("__pycache__"))
    build = "from setuptools.build_meta import build_wheel; build_wheel('dist')"
    run_python("-c", build, cwd=tree)
    (built,) = (tree / "dist").glob("*.whl")
    return built


def test_wheel_holds_every_file_of_the_package(wheel: Path) -> None:
    names = {PurePosixPath(name) for name in zipfile.ZipFile(wheel).namelist()}
    shipped = {path for path in names if path.parts[0] == "unispec"}
    source = {
        PurePosixPath("unispec", *path.relative_to(SOURCE).parts)
        for path in SOURCE.rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert shipped == source
    assert PurePosixPath("unispec/py.typed") in shipped
    others = {path.parts[0] for path in names} - {"unispec"}
    assert others == {"unispec-0.1.0.dist-info"}, "nothing but the package may be installed"


def test_installed_wheel_finds_its_modules_and_its_drafts(wheel: Path, tmp_path: Path) -> None:
    zipfile.ZipFile(wheel).extractall(tmp_path)
    code = (
        "import unispec.checkpoints.demo as demo; "
        "print(demo.__file__); print(*map(demo.demo_draft_folder, demo.DEMO_METHODS), sep='\\n')"
    )
    module, *drafts = run_python("-c", code, cwd=tmp_path, PYTHONPATH=str(tmp_path)).splitlines()
    assert Path(module).is_relative_to(tmp_path / "unispec")
    assert {Path(draft).name for draft in drafts} == {"smollm2-135m-dflash", "smollm2-135m-eagle3"}
    for draft in drafts:
        assert {path.name for path in Path(draft).iterdir()} >= {"config.json", "model.safetensors"}


def test_runtime_requirements_hold_max_and_no_torch(wheel: Path) -> None:
    text = zipfile.ZipFile(wheel).read("unispec-0.1.0.dist-info/METADATA").decode()
    requirements = [Requirement(line) for line in Parser().parsestr(text).get_all("Requires-Dist")]
    runtime = {r.name: r for r in requirements if r.marker is None}
    assert "torch" not in runtime
    assert runtime["max"].extras == {"serve"}
    assert runtime["max"].specifier == SpecifierSet("==26.7.*")
    with_torch = {
        extra
        for extra in ("bench", "docs", "test", "train")
        for r in requirements
        if r.name == "torch" and r.marker is not None and r.marker.evaluate({"extra": extra})
    }
    assert with_torch == {"bench", "test", "train"}


def test_script_and_module_show_the_same_help() -> None:
    (script,) = entry_points(group="console_scripts", name="unispec")
    assert script.value == "unispec.cli:main"
    code = f"import sys; from {script.module} import {script.attr}; sys.exit({script.attr}())"
    from_script = run_python("-c", code, "--help", cwd=ROOT)
    assert from_script == run_python("-m", "unispec.cli", "--help", cwd=ROOT)
    assert "generate" in from_script


def imported_packages(module: Path) -> Iterator[str]:
    """The top-level names that a module imports, wherever in it that is written."""
    for node in ast.walk(ast.parse(module.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module is not None and node.level == 0:
            yield node.module.partition(".")[0]


def test_every_imported_package_is_a_runtime_requirement() -> None:
    """Declared by us, not merely pulled in by somebody else; so torch cannot slip in either."""
    requirements = [Requirement(line) for line in distribution("unispec").requires or ()]
    declared, trains, deploys = (
        {
            canonicalize_name(requirement.name)
            for requirement in requirements
            if requirement.marker is None or requirement.marker.evaluate({"extra": extra})
        }
        for extra in ("", "train", "ray")
    )
    distributions = packages_distributions()
    own = {"unispec", *sys.stdlib_module_names}
    undeclared = {
        f"{module.relative_to(ROOT)}: {name}"
        for module in MODULES
        for name in set(imported_packages(module)) - own
        if (
            trains
            if TRAINING in module.parents or module in OF_THE_EXTRA
            else deploys
            if DEPLOYMENT in module.parents
            else declared
        ).isdisjoint(canonicalize_name(found) for found in distributions.get(name, ()))
    }
    assert undeclared == set()


def test_every_module_imports_where_torch_is_not_installed(tmp_path: Path) -> None:
    code = """
import importlib, pkgutil, sys
sys.modules["torch"] = None
import unispec
for package in pkgutil.iter_modules(unispec.__path__, "unispec."):
    if package.name == "unispec.training":
        continue
    path = importlib.import_module(package.name).__path__ if package.ispkg else ()
    print(package.name)
    for module in pkgutil.walk_packages(path, package.name + "."):
        importlib.import_module(module.name)
        print(module.name)
"""
    imported = set(run_python("-c", code, cwd=tmp_path).split())
    expected = {
        ".".join(["unispec", *module.relative_to(SOURCE).with_suffix("").parts]).removesuffix(
            ".__init__"
        )
        for module in MODULES
        if TRAINING not in module.parents
    }
    assert imported == expected - {"unispec"}


def test_training_without_its_extra_is_refused(tmp_path: Path) -> None:
    code = """
import importlib.util, sys
find = importlib.util.find_spec
importlib.util.find_spec = lambda name, *more: None if name == "torch" else find(name, *more)
from unispec.cli import unispec
sys.argv[1:] = ["train", "--model", "m", "--speculative-method", "eagle", "--output", "o"]
unispec()
"""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 2
    assert done.stderr == (
        "error: torch is not installed; install the `train` extra, in a clone with pip install"
        " -c constraints.txt -e '.[train]'\n"
    )


def installed_closure(name: str, extras: frozenset[str]) -> Iterator[str]:
    """The normalised names of what is installed because of a distribution and its extras."""
    todo, seen = [(canonicalize_name(name), extras)], set()
    while todo:
        current = todo.pop()
        if current in seen:
            continue
        seen.add(current)
        for line in distribution(current[0]).requires or ():
            requirement = Requirement(line)
            wanted = [{"extra": extra} for extra in ("", *current[1])]
            if requirement.marker is None or any(map(requirement.marker.evaluate, wanted)):
                needed = canonicalize_name(requirement.name)
                todo.append((needed, frozenset(requirement.extras)))
                if needed != name:  # by whose extras others are named
                    yield needed


def test_lock_pins_each_package_once_for_each_python() -> None:
    text = (ROOT / "constraints.txt").read_text(encoding="utf-8")
    pins = [Requirement(line) for line in text.splitlines() if not line.startswith("#")]
    for pin in pins:
        (specifier,) = pin.specifier
        assert specifier.operator == "==" and "+" not in specifier.version, str(pin)
        assert pin.url is None, str(pin)
    for python in SUPPORTED_PYTHONS:
        names = [
            canonicalize_name(pin.name)
            for pin in pins
            if pin.marker is None or pin.marker.evaluate({"python_version": python})
        ]
        assert len(names) == len(set(names)), python
    here = {
        canonicalize_name(pin.name) for pin in pins if pin.marker is None or pin.marker.evaluate()
    }
    assert set(installed_closure("unispec", frozenset({"test"}))) <= here
