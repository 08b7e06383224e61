"""Which schemas of a schema the engine puts together into one."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Final

from .reach import children, target_of

__all__ = ["joined_with_others"]

_OF_OBJECTS: Final = {
    *("properties", "patternProperties", "additionalProperties", "required"),
    *("minProperties", "maxProperties"),
}
_IN_PLACE: Final = ("anyOf", "oneOf", "$ref", "const", "enum", "not")


def joined_with_others(schema: dict[str, Any], nodes: Iterable[dict[str, Any]]) -> set[int]:
    """Finds the schemas that describe a value together with another one.

    Such as the parts of `allOf`, or what `$ref` names beside `properties`; alternatives of
    `anyOf` alone do not. All that lies in one counts as well, as the other may speak of it too.

    Args:
        schema: where references lead.
        nodes: the schemas to look at.

    Returns:
        Their `id`s.
    """
    found: dict[int, Any] = {}
    open_: list[Any] = []
    for node in nodes:
        if _parts(node) > 1:
            open_.append(node)
        if "patternProperties" in node and "properties" in node:
            open_ += children(node)  # a pattern may name a property too
    while open_:
        node = open_.pop()
        if isinstance(node, dict) and id(node) not in found:
            found[id(node)] = node
            open_ += children(node)
            open_.append(target_of(schema, node.get("$ref")))
    return set(found)


def _parts(node: dict[str, Any]) -> int:
    """How many descriptions of one object are in this schema."""
    every = node.get("allOf", [])
    return (
        (len(every) if isinstance(every, list) else 0)
        + sum(keyword in node for keyword in _IN_PLACE)
        + (not _OF_OBJECTS.isdisjoint(node))
    )
