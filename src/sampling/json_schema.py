"""JSON schemas as the grammar engine has to be given them.

The engine rounds large numbers, lets quotes and backslashes into some character classes, wants
properties in the schema's order, and recurses. What it would get wrong is written differently
here, or refused by name.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from decimal import Decimal, InvalidOperation
from itertools import chain, combinations
from typing import Any, Final, NoReturn

from typing_extensions import Self

from unispec.checkpoints.json_object import MAX_DEPTH, is_deeper_than

__all__ = ["rewrite_schema"]

_LARGEST: Final = 2**53
"""Integers beyond it are not all floats, and floats are what the engine keeps."""
_NUMBERS: Final = (
    *("const", "enum", "multipleOf"),
    *("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum"),
)
_MAX_CHAIN: Final = 1000
"""References that lead to one another; the engine follows them by recursion."""
_ENGINE_DEPTH: Final = 120
"""How deep the engine's JSON may be nested, less what it wraps around a schema."""
_MAX_EARLY: Final = 3
"""Optional properties before a required one, of which each set is an alternative of its own."""

_ONE: Final = ("items", "additionalItems", "additionalProperties", "not", "contains")
_LISTS: Final = ("allOf", "anyOf", "oneOf", "prefixItems", "items")
_MAPS: Final = ("properties", "patternProperties")
_DEFINITIONS: Final = ("$defs", "definitions")
_IN_PLACE: Final = ("allOf", "anyOf", "oneOf", "$ref", "const", "enum", "not")

_FLAG_X: Final = re.compile(r"\(\?[a-zA-Z]*x[a-zA-Z-]*[:)]")
_FIRST_IN_CLASS: Final = re.compile(r"\^?\]?")
"""Where a closing bracket is a character."""
_UNWRITABLE: Final = re.compile(r"[\x00-\x07\x0b\x0e-\x1f\x7f]")
"""Control characters that JSON can only write by their number, which is never allowed: a key could
otherwise hide behind such a writing of its letters."""


def rewrite_schema(text: str) -> Iterator[str]:
    """Rewrites a schema; gives one after the other, for the engine to take the first that it can.

    The first lets optional properties that follow the last required one come in any order, and
    those before, if they are few, at their place or later. It needs `additionalProperties`.

    Args:
        text: the schema, a JSON object.

    Raises:
        ValueError: it is no JSON object, is nested too deep, or has what the engine would not
            enforce; the text says what.
    """
    schema = _parse(text)
    nodes = _reachable(schema)
    for node in _everything(schema) if nodes is None else nodes:
        _check_values(node)
        _leave_out_nul(node)
    strict = json.dumps(schema)
    shared: dict[str, Any] = {}
    for node in nodes or ():
        _free_order(node, shared)
    known = schema.get("$defs", {})
    if isinstance(known, dict) and known.keys().isdisjoint(shared):
        free = {**schema, "$defs": known | shared} if shared else schema
        if not is_deeper_than(free, _ENGINE_DEPTH):
            yield json.dumps(free)
    yield strict


def _parse(text: str) -> dict[str, Any]:
    try:
        schema = json.loads(text, parse_int=_integer, parse_float=_float, parse_constant=_no_number)
        deep = isinstance(schema, dict) and is_deeper_than(schema, MAX_DEPTH)
    except RecursionError:
        deep = True
    if deep:
        raise ValueError(f"it is nested more than {MAX_DEPTH} deep")
    if not isinstance(schema, dict):
        raise ValueError("it is not a JSON object")
    return schema


class _Rounded(float):
    """A number that floats do not hold to the digit; 0 where they do not hold it at all."""

    text: str

    def __new__(cls, text: str) -> Self:
        value = float(text)
        rounded = super().__new__(cls, value if math.isfinite(value) else 0)
        rounded.text = text
        return rounded


def _integer(text: str) -> int | float:
    return int(text) if len(text) < 40 else _Rounded(text)


def _float(text: str) -> float:
    try:
        exact = Decimal(text) == Decimal(repr(float(text)))
    except InvalidOperation:  # an exponent of twenty digits
        exact = False
    return float(text) if exact else _Rounded(text)


def _no_number(text: str) -> NoReturn:
    raise ValueError(f"{text} is no number of JSON")


def _reachable(schema: dict[str, Any]) -> list[dict[str, Any]] | None:
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
        inner = [(child, followed) for child in _children(node)]
        if "$ref" in node:
            target = _target(schema, node["$ref"])
            if target is None:
                return None
            inner.insert(0, (target, followed + 1))
        if node is not schema and not {"$id", "id", "$anchor", "$dynamicRef"}.isdisjoint(node):
            return None
        open_ += reversed(inner)
    return list(found.values())


def _everything(schema: dict[str, Any]) -> list[dict[str, Any]]:
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


def _children(node: dict[str, Any]) -> Iterator[Any]:
    """Schemas directly in a schema, definitions apart."""
    for keyword, value in node.items():
        if keyword in _LISTS and isinstance(value, list):
            yield from value
        elif keyword in _ONE:
            yield value
        elif keyword in _MAPS and isinstance(value, dict):
            yield from value.values()


def _target(schema: dict[str, Any], reference: Any) -> Any:
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


def _check_values(node: dict[str, Any]) -> None:
    """Refuses numbers that the engine rounds, and strings that it cannot write."""
    for keyword in _NUMBERS:
        for value in _scalars(node.get(keyword)):
            if isinstance(value, str) and keyword in ("const", "enum"):
                if bad := _UNWRITABLE.search(value):
                    raise ValueError(
                        f"its {keyword} has the control character U+{ord(bad[0]):04X}, which"
                        " cannot be enforced"
                    )
            elif isinstance(value, _Rounded):
                raise ValueError(
                    f"its {keyword} {value.text[:60]} cannot be enforced to the last digit"
                )
            elif isinstance(value, int | float):
                # The next integer is not a float any more.
                limit = _LARGEST - keyword.startswith("exclusive")
                if abs(value) > limit:
                    raise ValueError(
                        f"its {keyword} {value} is beyond 2^53, where numbers cannot be enforced"
                    )


def _scalars(value: Any) -> Iterator[Any]:
    open_ = [value]
    while open_:
        value = open_.pop()
        if isinstance(value, list):
            open_ += value
        elif isinstance(value, dict):
            open_ += (*value, *value.values())
        else:
            yield value


def _leave_out_nul(node: dict[str, Any]) -> None:
    """Takes U+0000, which is never allowed, out of the character classes of patterns.

    The engine takes a class with all control characters, or all but the end of a line, for one
    that has quotes and backslashes.
    """
    if isinstance(node.get("pattern"), str):
        node["pattern"] = _without_nul(node["pattern"])
    named = node.get("patternProperties")
    if isinstance(named, dict):
        node["patternProperties"] = {_without_nul(key): value for key, value in named.items()}


def _without_nul(pattern: str) -> str:
    parts = []
    at = 0
    while at < len(pattern):
        end = at + 1
        if pattern[at] == "\\":
            end = at + 2
        elif pattern[at] == "[":
            end = _class_end(pattern, at)
            parts.append(rf"[{pattern[at:end]}--\x00]")
            at = end
            continue
        elif _FLAG_X.match(pattern, at):
            raise ValueError("its pattern has the flag x, which cannot be enforced")
        parts.append(pattern[at:end])
        at = end
    return "".join(parts)


def _class_end(pattern: str, at: int) -> int:
    """Where the bracket that opens at `at` has closed; classes may be in one another."""
    depth = 0
    while at < len(pattern):
        if pattern[at] == "\\":
            at += 1
        elif pattern[at] == "[":
            depth += 1
            at += len(_FIRST_IN_CLASS.findall(pattern, at + 1, at + 3)[0])
        elif pattern[at] == "]":
            depth -= 1
            if depth == 0:
                return at + 1
        at += 1
    return len(pattern)


def _free_order(node: dict[str, Any], shared: dict[str, Any]) -> None:
    """Lets optional properties come in any order, where other keys may come as well.

    The engine has `properties` in their order, then those of `patternProperties` in any order, so
    optional ones move there. Otherwise a key that comes out of order could only go on as another
    key: `name` as `names`.
    """
    properties, required = node.get("properties"), node.get("required", [])
    if not isinstance(properties, dict) or not isinstance(required, list):
        return
    counted = {"patternProperties", "minProperties", "maxProperties"} & node.keys()
    if counted or node.get("additionalProperties", True) is False:
        return
    names = list(properties)
    last = max((at for at, name in enumerate(names) if name in required), default=-1)
    late = [name for name in names[last + 1 :] if not _UNWRITABLE.search(name)]
    early = [
        name
        for name in names[: max(last, 0)]
        if name not in required and not _UNWRITABLE.search(name)
    ]
    if len(early) > _MAX_EARLY or not node.keys().isdisjoint(_IN_PLACE):
        early = []
    if early:
        _share(properties, shared)
    sets = chain.from_iterable(combinations(early, size) for size in range(len(early) + 1))
    alternatives = [_moved(node, {*absent, *late}) for absent in sets]
    outer: dict[str, Any] = {
        name: node[name] for name in ("$schema", "$id", *_DEFINITIONS) if name in node
    }
    node.clear()
    if len(alternatives) == 1:
        node.update(alternatives[0])
    else:
        inner = [{k: v for k, v in each.items() if k not in outer} for each in alternatives]
        node.update(outer, anyOf=inner)


def _moved(node: dict[str, Any], names: set[str]) -> dict[str, Any]:
    """A copy whose properties of these names are in `patternProperties`."""
    properties = node["properties"]
    kept = {name: value for name, value in properties.items() if name not in names}
    moved = {f"^{re.escape(name)}$": properties[name] for name in properties if name in names}
    copy = dict(node)
    for keyword, schemas in (("properties", kept), ("patternProperties", moved)):
        copy[keyword] = schemas
    return copy if moved else dict(node)


def _share(properties: dict[str, Any], shared: dict[str, Any]) -> None:
    """Moves the schemas to definitions, for several alternatives to refer to."""
    for name, schema in properties.items():
        if isinstance(schema, dict) and any(isinstance(v, dict | list) for v in schema.values()):
            key = f"unispec-{len(shared)}"
            shared[key] = schema
            properties[name] = {"$ref": f"#/$defs/{key}"}
