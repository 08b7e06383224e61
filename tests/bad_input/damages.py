"""Damages of a sound pair's files, and what is said where one is run."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from typing import Any

from click.testing import CliRunner, Result
from tiny import TinyPair

from unispec.cli import unispec

__all__ = [
    "SOUND",
    "WEIGHTS",
    "CompileReachedError",
    "Damage",
    "assert_refused",
    "check",
    "config",
    "content",
    "removed",
    "run",
]

PROGRESS = re.compile(r" *\d+\.\d s  \S")
WEIGHTS = "model.safetensors"

Damage = Callable[[TinyPair], object]


class CompileReachedError(BaseException):
    """Nothing on the way catches it."""


def run(pair: TinyPair, *flags: str) -> Result:
    """Runs `unispec generate`; a later flag overrides an earlier one."""
    arguments = ["generate", "--model", str(pair.target), "--draft-model-path", str(pair.draft)]
    arguments += ["--speculative-method", "eagle", "--prompt", "hello", *flags]
    return CliRunner().invoke(unispec, arguments, catch_exceptions=False)


def assert_refused(status: int, stdout: str, stderr: str, *words: str) -> None:
    """Asserts status 2 and, progress aside, one line on stderr that holds these words."""
    assert (status, stdout) == (2, "")
    lines = [line for line in stderr.splitlines() if not PROGRESS.match(line)]
    assert len(lines) == 1, stderr
    assert lines[0].startswith("error: ")
    for word in words:
        assert word in lines[0]


def config(part: str, **changes: object) -> Damage:
    """Changes fields of a config.json; ... removes one."""

    def damage(pair: TinyPair) -> None:
        file = getattr(pair, part) / "config.json"
        fields = json.loads(file.read_text()) | changes
        file.write_text(json.dumps({k: v for k, v in fields.items() if v is not ...}))

    return damage


def content(part: str, name: str, text: str | bytes) -> Damage:
    data = text.encode() if isinstance(text, str) else text
    return lambda pair: (getattr(pair, part) / name).write_bytes(data)


def removed(part: str, *names: str) -> Damage:
    return lambda pair: [(getattr(pair, part) / name).unlink() for name in names]


SOUND: Damage = lambda pair: None  # noqa: E731


def check(pair: TinyPair, damage: Damage, flags: list[str], words: list[str]) -> None:
    damage(pair)
    names: dict[str, Any] = {"{target}": pair.target, "{draft}": pair.draft}

    def resolved(text: str) -> str:
        for name, path in names.items():
            text = text.replace(name, str(path))
        return text

    result = run(pair, *map(resolved, flags))
    assert_refused(result.exit_code, result.stdout, result.stderr, *map(resolved, words))
