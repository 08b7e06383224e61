"""Which schemas lie in a schema, and where its references lead."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any, Final

__all__ = ["children", "everything", "reachable", "target_of"]

_MAX_CHAIN: Final = 1000
"""References that lead to one another; the engine follows them by recursion."""

_ONE: Final = ("items", "additionalItems", "additionalProperties", "not", "contains")
_LISTS: Final = ("allOf", "anyOf", "oneOf", "prefixItems", "items")
_MAPS: Final = ("properties", "patternProperties")


def reachable(schema: dict[str, Any]) -> list[dict[str, Any]] | None:
    """The schema and those in it that count, the outer before the inner ones.

    Returns:
        None if a reference is no path from the top, so that only the engine knows what it names.

    Raises:
        ValueError: references lead to one another too often.
    """
    found: dict[int, dict[str, Any]] = {}
    # Depth first and in the text's order, as the engine meets them.
    open_: list[tuple[Any, int]] = [(schema, 0)]
    while open_:
        node, followed = open_.pop()
        if not isinstance(node, dict) or id(node) in found:
            continue
        if followed > _MAX_CHAIN:
            raise ValueError(f"more than {_MAX_CHAIN} of its references lead to one another")
        found[id(node)] = node
        inner = [(child, followed) for child in children(node)]
        if "$ref" in node:
            target = target_of(schema, node["$ref"])
            if target is None:
                return None
            inner.insert(0, (target, followed + 1))
        if node is not schema and not {"$id", "id", "$anchor", "$dynamicRef"}.isdisjoint(node):
            return None
        open_ += reversed(inner)
    return list(found.values())


def everything(schema: dict[str, Any]) -> list[dict[str, Any]]:
    """Every object in the schema, be it a schema itself or not."""
    found = []
    open_: list[Any] = [schema]
    while open_:
        node = open_.pop()
        if isinstance(node, dict):
            found.append(node)
        if isinstance(node, dict | list):
            open_ += node.values() if isinstance(node, dict) else node
    return found


def children(node: dict[str, Any]) -> Iterator[Any]:
    """Schemas directly in a schema, definitions apart."""
    for keyword, value in node.items():
        if keyword in _LISTS and isinstance(value, list):
            yield from value
        elif keyword in _ONE:
            yield value
        elif keyword in _MAPS and isinstance(value, dict):
            yield from value.values()


def target_of(schema: dict[str, Any], reference: Any) -> Any:
    """What a reference into the schema names; None if it is not there."""
    if not isinstance(reference, str) or not re.match(r"#(/|$)", reference):
        return None
    node: Any = schema
    for part in reference.split("/")[1:]:
        key = part.replace("~1", "/").replace("~0", "~")
        if isinstance(node, list) and key.isdecimal() and int(key) < len(node):
            node = node[int(key)]
        else:
            node = node.get(key) if isinstance(node, dict) else None
    return node
