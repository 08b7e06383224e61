"""From the schema that a user gives to those that the engine is given."""

from __future__ import annotations

import json
from collections.abc import Iterator

from unispec.checkpoints.json_object import is_deeper_than

from .order import free_orders
from .patterns import leave_out_nul
from .reach import everything, reachable
from .values import check_values, parse_schema

__all__ = ["rewrite_schema"]

_ENGINE_DEPTH = 120
"""How deep the engine's JSON may be nested, less what it wraps around a schema."""


def rewrite_schema(text: str) -> Iterator[str]:
    """Rewrites a schema; gives one after the other, for the engine to take the first that it can.

    The first lets optional properties come in other orders than the schema's, where that leaves
    the schema's own order allowed; the last is in the schema's order throughout.

    Args:
        text: The schema, a JSON object.

    Raises:
        ValueError: It is no JSON object, is nested too deep, or has what the engine would not
            enforce; the text says what.
    """
    schema = parse_schema(text)
    nodes = reachable(schema)
    for node in everything(schema) if nodes is None else nodes:
        check_values(node)
        leave_out_nul(node)
    strict = json.dumps(schema)
    shared = free_orders(schema, nodes or [])
    known = schema.get("$defs", {})
    if isinstance(known, dict) and known.keys().isdisjoint(shared):
        free = {**schema, "$defs": known | shared} if shared else schema
        if not is_deeper_than(free, _ENGINE_DEPTH):
            yield json.dumps(free)
    yield strict
