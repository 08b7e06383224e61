"""JSON objects from files that others wrote: read whole, or refused in one sentence."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any, Final

from unispec.errors import InputError

__all__ = ["MAX_DEPTH", "is_deeper_than", "parse_json_object", "read_json_object"]

# The largest that are published, tokenizers of 256,000 tokens, have 40 MB.
_MAX_BYTES: Final = 100_000_000
# What reads the object after us walks it recursively; published files are 10 deep at most.
MAX_DEPTH: Final = 64
"""How deep objects and lists may lie in one another."""


def read_json_object(path: Path, *, label: str, fix: str) -> dict[str, Any]:
    """Reads a file that holds one JSON object.

    Args:
        label: what to call it in errors.
        fix: what the user can do, for the errors.

    Raises:
        InputError: it cannot be read, or see `parse_json_object`.
    """
    try:
        size = path.stat().st_size
        if size > _MAX_BYTES:
            raise InputError(
                f"{label} has {size} bytes, no JSON object of a model has more than {_MAX_BYTES}:"
                f" {fix}"
            )
        raw = path.read_bytes()
    except OSError as error:
        raise InputError(f"{label} cannot be read ({error.strerror or error}): {fix}") from error
    return parse_json_object(raw, label=label, fix=fix)


def parse_json_object(raw: bytes, *, label: str, fix: str) -> dict[str, Any]:
    """Parses one JSON object.

    Raises:
        InputError: it is no JSON, no object, has a number that is not finite, or is nested
            deeper than any that a model needs.
    """
    try:
        value = json.loads(raw.decode(), object_pairs_hook=_finite)
    except ValueError as error:
        raise InputError(f"{label} is no JSON ({error}): {fix}") from error
    except RecursionError as error:
        raise InputError(f"{label} is nested more than {MAX_DEPTH} deep: {fix}") from error
    if not isinstance(value, dict):
        raise InputError(f"{label} is a JSON {type(value).__name__} and no object: {fix}")
    if is_deeper_than(value, MAX_DEPTH):
        raise InputError(f"{label} is nested more than {MAX_DEPTH} deep: {fix}")
    return value


def _finite(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    for name, value in pairs:
        if (number := _not_finite(value)) is not None:
            raise ValueError(f"{name} {number} is no finite number")
    return dict(pairs)


def _not_finite(value: Any) -> float | None:
    """The first such number; objects in a list were looked at already."""
    if isinstance(value, float):
        return None if math.isfinite(value) else value
    if isinstance(value, list):
        return next((found for item in value if (found := _not_finite(item)) is not None), None)
    return None


def is_deeper_than(value: dict[str, Any], limit: int) -> bool:
    """Whether objects and lists lie in one another more than `limit` deep."""
    level: list[Any] = [value]
    for _ in range(limit):
        children = [item.values() if isinstance(item, dict) else item for item in level]
        level = [c for items in children for c in items if isinstance(c, dict | list)]
        if not level:
            return False
    return True
