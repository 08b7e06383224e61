"""Typed access to the key-value pairs of a GGUF file."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import numpy as np

from unispec.errors import InputError

__all__ = ["Metadata"]

_T = TypeVar("_T")


@dataclass(frozen=True)
class Metadata:
    """The key-value pairs of a GGUF file.

    A value of another type than asked for, and a missing key that has no default,
    is an InputError that names the file and the key.

    Attributes:
        path: the file, for the errors.
        values: the pairs, see `GGUFFile`; text is decoded when it is asked for.
    """

    path: Path
    values: Mapping[str, Any]

    def optional_integer(self, key: str) -> int | None:
        """An integer, or None where the key is missing."""
        value = self._value(key)
        if value is None or type(value) is int:
            return value
        self._refuse(key, value, "an integer")

    def integer(self, key: str, *, default: int | None = None) -> int:
        """An integer."""
        return self._present(key, self.optional_integer(key), default)

    def number(self, key: str, *, default: float | None = None) -> float:
        """A finite float, or an integer as a float."""
        value = self._value(key)
        if value is None or (type(value) in (int, float) and math.isfinite(value)):
            return float(self._present(key, value, default))
        self._refuse(key, value, "a finite number")

    def flag(self, key: str, *, default: bool) -> bool:
        """A bool."""
        value = self._value(key)
        if value is None or isinstance(value, bool):
            return self._present(key, value, default)
        self._refuse(key, value, "a bool")

    def optional_text(self, key: str) -> str | None:
        """A string, or None where the key is missing."""
        value = self._value(key)
        if value is None or isinstance(value, str):
            return value
        self._refuse(key, value, "a string")

    def text(self, key: str) -> str:
        """A string."""
        return self._present(key, self.optional_text(key), None)

    def array(self, key: str, kind: type[_T]) -> list[_T]:
        """A list whose items are all of one Python type."""
        value = self._present(key, self._value(key), None)
        if isinstance(value, list) and all(type(item) is kind for item in value):
            return value
        self._refuse(key, value, f"a list of {kind.__name__}")

    def _value(self, key: str) -> Any:
        value = self.values.get(key)
        if isinstance(value, np.ndarray):
            return value.tolist()
        try:
            if isinstance(value, list):
                return [item.decode() for item in value]
            return value.decode() if isinstance(value, bytes) else value
        except UnicodeDecodeError as error:
            raise InputError(
                f"{self.path}: metadata key {key!r} is no UTF-8 ({error.reason} at byte"
                f" {error.start} of {error.object[:40]!r}): convert the model again"
            ) from error

    def _present(self, key: str, value: _T | None, default: _T | None) -> _T:
        found = default if value is None else value
        if found is None:
            raise InputError(f"{self.path} has no metadata key {key!r}: convert the model again")
        return found

    def _refuse(self, key: str, value: Any, wanted: str) -> NoReturn:
        raise InputError(
            f"{self.path}: metadata key {key!r} is {str(value)[:80]!r} and not {wanted}: convert"
            " the model again"
        )
