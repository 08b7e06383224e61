"""The documented API, held against the classes by inspection."""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import json
from enum import Enum
from pathlib import Path
from types import FunctionType
from typing import Any

import pytest

CONTRACT = json.loads((Path(__file__).parent / "data" / "api_contract.json").read_text())["modules"]
OBJECTS = [(module, name) for module in CONTRACT for name in CONTRACT[module]["objects"]]


VARIADIC = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
KINDS = {"classmethod": classmethod, "staticmethod": staticmethod, "method": FunctionType}


def entry(module: str, name: str) -> tuple[type, dict[str, Any]]:
    cls = getattr(importlib.import_module(f"unispec.pipelines.{module}"), name)
    return cls, CONTRACT[module]["objects"][name]


def shown(default: Any) -> str:
    """A default as the contract writes it."""
    if isinstance(default, Enum):
        return f"{type(default).__name__}.{default.name}"
    return repr(default)


def assert_signature(callable_: Any, documented: list[dict[str, Any]], where: str) -> None:
    """Documented parameters in order; what follows is keyword-only with a default."""
    actual = [p for p in inspect.signature(callable_).parameters.values() if p.name != "self"]
    # The contract writes the stars into the names.
    variadic = [str(p).partition(":")[0] for p in actual if p.kind in VARIADIC]
    assert variadic == [p["name"] for p in documented if p["name"].startswith("*")], where
    actual = [p for p in actual if p.kind not in VARIADIC]
    documented = [p for p in documented if not p["name"].startswith("*")]
    by_name = {parameter.name: parameter for parameter in actual}
    positional = [p.name for p in actual if p.kind is p.POSITIONAL_OR_KEYWORD]
    expected = [p["name"] for p in documented if p["kind"] == "positional_or_keyword"]
    assert positional == expected, where
    for parameter in documented:
        found = by_name.pop(parameter["name"])
        assert found.kind.name.lower() == parameter["kind"], f"{where}: {found}"
        if parameter["default"] is None:
            assert found.default is inspect.Parameter.empty, f"{where}: {found}"
        else:
            assert shown(found.default) == parameter["default"], f"{where}: {found}"
    for extra in by_name.values():
        assert extra.kind is extra.KEYWORD_ONLY, f"{where}: {extra}"
        assert extra.default is not inspect.Parameter.empty, f"{where}: {extra}"


def test_all_classes_are_looked_at() -> None:
    assert len(OBJECTS) == 18


@pytest.mark.parametrize(("module", "name"), OBJECTS)
def test_bases_and_kind(module: str, name: str) -> None:
    cls, documented = entry(module, name)
    mro = {base.__name__ for base in cls.__mro__}
    assert set(documented["bases"]) <= mro
    assert dataclasses.is_dataclass(cls) == (documented["kind"] == "dataclass")


@pytest.mark.parametrize(("module", "name"), OBJECTS)
def test_constructor(module: str, name: str) -> None:
    cls, documented = entry(module, name)
    assert_signature(cls, documented["signature"], name)


@pytest.mark.parametrize(("module", "name"), OBJECTS)
def test_attributes(module: str, name: str) -> None:
    cls, documented = entry(module, name)
    declared = {key for base in cls.__mro__ for key in getattr(base, "__annotations__", {})}
    assert set(documented["attributes"]) <= declared


@pytest.mark.parametrize(("module", "name"), OBJECTS)
def test_methods(module: str, name: str) -> None:
    cls, documented = entry(module, name)
    for method, contract in documented["methods"].items():
        static = inspect.getattr_static(cls, method)
        where = f"{name}.{method}"
        if contract["kind"] == "property":
            assert isinstance(static, property), where
            continue
        assert isinstance(static, KINDS[contract["kind"]]), where
        assert_signature(getattr(cls, method), contract["signature"], where)
