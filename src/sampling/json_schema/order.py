"""The order of an object's keys, freed where the engine can be given another one.

The engine has `properties` in their order, then those of `patternProperties` in any order, so
optional ones move there. Otherwise a key that comes out of order could only go on as another
key: `name` as `names`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from itertools import chain, combinations
from typing import Any, Final

from .joined import joined_with_others
from .reach import children
from .values import UNWRITABLE

__all__ = ["free_orders"]

_MAX_PLACES: Final = 800
"""Properties in all alternatives that a schema is given. Of 2,000 that are open at one place the
engine gives up."""


def free_orders(schema: dict[str, Any], nodes: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Frees the order in the objects where others are allowed to have further keys, in place.

    Optional properties behind the last required one move. Those before it may stand there or come
    later, which takes an alternative for each set of them; where there is no room for all sets,
    the last ones move together, and where there is not even room for that, all or none.

    Args:
        schema: the schema as a whole.
        nodes: all schemas in it, the outer before the inner ones.

    Returns:
        Definitions that the objects now refer to, for `$defs` of the schema.
    """
    shared: dict[str, Any] = {}
    joined = joined_with_others(schema, nodes)
    movable = [
        (node, *_early_and_late(node))
        for node in nodes
        if id(node) not in joined and _has_free_keys(node)
    ]
    room = _MAX_PLACES // max(1, sum(bool(early) for _, early, _ in movable))
    for node, early, late in movable:
        absent = _absent(early, room // max(1, len(node["properties"])))
        if len(absent) > 1:
            _share(node, shared)
        alternatives = [_moved(node, {*names, *late}) for names in absent]
        outer: dict[str, Any] = {
            name: node[name] for name in ("$schema", "$id", "$defs", "definitions") if name in node
        }
        node.clear()
        if len(alternatives) == 1:
            node.update(alternatives[0])
        else:
            inner = [{k: v for k, v in each.items() if k not in outer} for each in alternatives]
            node.update(outer, anyOf=inner)
    return shared


def _has_free_keys(node: dict[str, Any]) -> bool:
    """Whether this is an object of keys that are neither all named nor counted."""
    return (
        isinstance(node.get("properties"), dict)
        and isinstance(node.get("patternProperties", {}), dict)
        and isinstance(node.get("required", []), list)
        and node.keys().isdisjoint(("minProperties", "maxProperties"))
        and node.get("additionalProperties", True) is not False
    )


def _early_and_late(node: dict[str, Any]) -> tuple[list[str], list[str]]:
    """The properties that may move, before and behind the last one that keeps its place."""
    properties, required = node["properties"], node.get("required", [])
    held = [name in required or bool(UNWRITABLE.search(name)) for name in properties]
    last = max((at for at, kept in enumerate(held) if kept), default=-1)
    if any(name not in properties for name in required if isinstance(name, str)):
        last = len(held)  # one that is not declared comes behind those that are
    free = [(at, name) for at, name in enumerate(properties) if not held[at]]
    return [n for at, n in free if at < last], [n for at, n in free if at > last]


def _absent(early: Sequence[str], most: int) -> Sequence[Iterable[str]]:
    """The sets of these that an alternative each lets come later, at most so many."""
    if 2 ** len(early) <= most:
        sizes = range(len(early) + 1)
        return [*chain.from_iterable(combinations(early, size) for size in sizes)]
    if len(early) < most:
        return [early[at:] for at in range(len(early), -1, -1)]
    return [(), early] if most > 1 else [()]


def _moved(node: dict[str, Any], names: set[str]) -> dict[str, Any]:
    """A copy whose properties of these names are in `patternProperties`."""
    if not names:
        return dict(node)
    properties = node["properties"]
    moved = {f"^{re.escape(name)}$": properties[name] for name in properties if name in names}
    return {
        **node,
        "properties": {name: value for name, value in properties.items() if name not in names},
        "patternProperties": node.get("patternProperties", {}) | moved,
    }


def _share(node: dict[str, Any], shared: dict[str, Any]) -> None:
    """Moves what the object's schemas hold to definitions, for several alternatives to refer to."""
    held = [node[name] for name in ("properties", "patternProperties") if name in node]
    for owner, name in [
        (node, "additionalProperties"),
        *((map_, key) for map_ in held for key in map_),
    ]:
        schema = owner.get(name)
        if isinstance(schema, dict) and any(isinstance(v, dict) for v in children(schema)):
            key = f"unispec-{len(shared)}"
            shared[key] = schema
            owner[name] = {"$ref": f"#/$defs/{key}"}
