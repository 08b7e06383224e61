"""From the schema that a user gives to those that the engine is given."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any, Final

from unispec.checkpoints.json_object import is_deeper_than

from .order import free_orders
from .patterns import leave_out_nul
from .reach import everything, reachable
from .values import check_values, parse_schema

__all__ = ["rewrite_schema"]

_ENGINE_DEPTH: Final = 120
"""How deep the engine's JSON may be nested, less what it wraps around a schema."""
_HINTS: Final = ("password", "binary")
"""Formats of OpenAPI that leave no text out."""
_MAX_PARTS: Final = 64
"""Parts of one allOf; the engine's time grows with the fifth power, and 100 take seconds."""


def rewrite_schema(text: str) -> Iterator[str]:
    """Rewrites a schema; gives one after the other, for the engine to take the first that it can.

    The first lets optional properties come in other orders than the schema's, where that leaves
    the schema's own order allowed; the last is in the schema's order throughout.

    Args:
        text: the schema, a JSON object.

    Raises:
        ValueError: it is no JSON object, is nested too deep, or has what the engine would not
            enforce; the text says what.
    """
    schema = parse_schema(text)
    nodes = reachable(schema)
    for node in everything(schema) if nodes is None else nodes:
        check_values(node)
        _check_parts(node)
        leave_out_nul(node)
    for node in nodes or ():
        _drop_what_asks_for_nothing(node)
    strict = json.dumps(schema)
    shared = free_orders(schema, nodes or [])
    known = schema.get("$defs", {})
    if isinstance(known, dict) and known.keys().isdisjoint(shared):
        free = {**schema, "$defs": known | shared} if shared else schema
        if not is_deeper_than(free, _ENGINE_DEPTH):
            yield json.dumps(free)
    yield strict


def _check_parts(node: dict[str, Any]) -> None:
    parts = node.get("allOf")
    if isinstance(parts, list) and len(parts) > _MAX_PARTS:
        raise ValueError(f"its allOf has {len(parts)} parts, and at most {_MAX_PARTS} are joined")


def _drop_what_asks_for_nothing(node: dict[str, Any]) -> None:
    """The engine refuses what it does not know, also where that leaves nothing out."""
    if node.get("uniqueItems") is False:
        del node["uniqueItems"]
    if node.get("format") in _HINTS:
        del node["format"]
